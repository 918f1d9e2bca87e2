"""Imports point down: the rule as data, and its proof over every module of the packages."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("emflow", "mpi_kernels")

# From the bottom up.  A module may import what is on its own level or below; a package's level holds for all in it.
# A module that stands nowhere here fails the test: whoever adds one decides where it belongs.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"mpi_kernels"}),
    frozenset({"emflow.errors", "emflow.records", "emflow.registry", "emflow.log"})
    | {"emflow.rpc", "emflow.rpc_daemon", "emflow.rpc_wire"},
    frozenset({"emflow.tomlfile", "emflow.config", "emflow.config_tables", "emflow.config_template", "emflow.recipes"}),
    frozenset({"emflow.acquisition_file", "emflow.runs", "emflow.service_lock"})
    | {
        "emflow.journal",
        "emflow.journal_database",
        "emflow.journal_rows",
        "emflow.journal_schema",
        "emflow.journal_usage",
    }
    | {"emflow.backlog", "emflow.growing_copy"}
    | {"emflow.watch", "emflow.prober", "emflow.probe_child", "emflow.schedulers"}
    | {"emflow.blocks", "emflow.copying", "emflow.transfer"}
    | {"emflow.synthetic_pace", "emflow.synthetic", "emflow.synthetic_hdf5", "emflow.synthetic_vendor"}
    | {"emflow.synthetic_streams"}
    | {"emflow.microscope"},
    frozenset({"emflow.steps", "emflow.pipeline", "emflow.rebuild", "emflow.agent"}),
    frozenset(
        {
            "emflow.timeline",
            "emflow.checks",
            "emflow.submission",
            "emflow.direct",
            "emflow.demo",
            "emflow.cli",
            "emflow.__main__",
        }
    ),
)
STDLIB_ONLY = ("mpi_kernels.contract", "mpi_kernels.errors", "mpi_kernels.jsonfile", "mpi_kernels.protocols")
HEAVY = ("mpi4py.MPI", "h5py", "hdf5plugin", "matplotlib", "cupy", "Pyro5", "starlette", "uvicorn", "IPython", "scipy")
HEAVY += ("pyslurm", "rsciio", "dask", "tifffile", "numcodecs")


def _modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names of the modules that statements import, as exactly as can be told."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def top_level_imports(module: str) -> set[str]:
    """Imports that run when the module is imported: not those inside functions, nor those for the type checker."""
    tree = parsed(module)
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    return set(imported(node for node in ast.walk(tree) if id(node) not in lazy))


@functools.cache
def graph() -> dict[str, set[str]]:
    """Our modules, and which of ours each imports when it is imported."""
    return {module: ours(top_level_imports(module)) - {module} for module in MODULES}


def level(module: str) -> int | None:
    """The level of the longest listed name that the module is, or lies in."""
    listed = {name: n for n, names in enumerate(LEVELS) for name in names}
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((listed[p] for p in prefixes if p in listed), None)


def ours(names: Iterable[str]) -> set[str]:
    return {n for n in names if n.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"emflow"}))
def test_module_has_a_place_and_imports_nothing_above_it(module: str) -> None:
    own = level(module)
    assert own is not None, f"{module} stands on no level: add it to LEVELS in {Path(__file__).name}"
    for name in sorted(ours(imported(ast.walk(parsed(module)))) - {"emflow"}):
        other = level(name)
        assert other is not None, f"{module} imports {name}, which stands on no level"
        assert other <= own, f"{module} (level {own}) imports {name} (level {other}): imports point down"


def test_levels_name_only_what_exists() -> None:
    assert not {name for names in LEVELS for name in names} - set(MODULES)


def test_the_package_itself_imports_no_module_of_the_service() -> None:
    assert not {n for n in imported(ast.walk(parsed("emflow"))) if n.startswith("emflow")}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.split(".")[0] == "mpi_kernels"))
def test_kernels_never_import_the_service(module: str) -> None:
    assert not [n for n in imported(ast.walk(parsed(module))) if n.split(".")[0] == "emflow"]


def test_kernels_work_where_the_service_is_not_installed() -> None:
    kernels = [m for m in MODULES if m.startswith("mpi_kernels") and not m.endswith("__main__")]
    code = f"import sys, importlib; sys.modules['emflow'] = None; [importlib.import_module(m) for m in {kernels!r}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_are_no_circles() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_local_import_hides_one_of_our_modules(module: str) -> None:
    tree = parsed(module)
    local = {
        name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for name in ours(imported(ast.walk(function)))
    }
    # a local import may make the start quicker (a command line that needs no kernels); it may not hide a circle
    for name in local - graph()[module]:
        assert module not in reached(name), f"{module} imports {name} in a function, and {name} leads back to it"


def reached(start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for name in graph().get(todo.pop(), set()) - seen:
            seen.add(name)
            todo.append(name)
    return seen


@pytest.mark.parametrize("module", STDLIB_ONLY)
def test_contract_needs_the_standard_library_only(module: str) -> None:
    allowed = set(sys.stdlib_module_names) | {*STDLIB_ONLY, "mpi_kernels"}
    assert {n for n in top_level_imports(module) if n.split(".")[0] not in allowed and n not in allowed} == set()
    code = (
        f"import sys; before = set(sys.modules); import {module}; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['mpi_kernels']"


def test_importing_everything_has_no_effect(tmp_path: Path) -> None:
    importable = [m for m in MODULES if not m.endswith("__main__")]
    code = f"""
import sys, threading, signal, logging, json, os, importlib
before = dict(os.environ), [signal.getsignal(n) for n in range(1, 65)], os.getcwd()
opened = []
def audit(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        opened.append(str(args[0]))
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.posix_spawn", "os.fork", "sqlite3.connect"):
        opened.append(event)
sys.addaudithook(audit)
for name in {importable!r}:
    importlib.import_module(name)
after = dict(os.environ), [signal.getsignal(n) for n in range(1, 65)], os.getcwd()
heavy = [m for m in {HEAVY!r} if m in sys.modules]
report = dict(opened=opened, heavy=heavy, same=before == after, threads=threading.active_count(),
              handlers=len(logging.getLogger().handlers))
print(json.dumps(report))
"""
    environment = dict(os.environ, HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1", XDG_CACHE_HOME=str(tmp_path))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    expected = {"opened": [], "heavy": [], "same": True, "threads": 1, "handlers": 0}
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert not list(tmp_path.iterdir())


def test_installed_packages_are_all_there() -> None:
    """A package that setup.cfg forgets is missing after an installation that is not editable."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    listed = set(text.partition("packages =")[2].partition("package_dir")[0].split())
    packages = {m for m, path in MODULES.items() if path.name == "__init__.py"} | {"emflow.slurm"}
    assert listed == packages
