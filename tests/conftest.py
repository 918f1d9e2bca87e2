"""What the tests may need from the machine, real input, and proof that no process outlives a test run.

A need is a marker (``needs_mpi``, ``needs_strace``, ...).  Where it is missing, the test is skipped with the reason
and the way to get it; a need that is named in ``EMFLOW_REQUIRE`` (comma list of the names in `PROBES`: ``mpi,strace``)
fails instead, so that CI can't go green by skipping.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from mpi_kernels.device import choose

if TYPE_CHECKING:
    from benchmarks.cluster import Cluster

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).resolve().parents[1]
TOKEN = f"EMFLOW_TEST_RUN={os.getpid()}.{secrets.token_hex(4)}"
GRACE_S = 5.0
SID = Path(os.environ.get("EMFLOW_SID", "/var/cache/emflow-sid"))
PEERS = ("hyperspy", "silx", "emdfile", "stempy", "libertem", "pyxem")


# --- needs ------------------------------------------------------------------------------------------------------------


def find_mpiexec() -> str | None:
    """Path of the mpiexec that belongs to this Python, else the one on PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def data_folder() -> Path:
    """The folder of real microscope files, there or not."""
    return Path(os.environ.get("EMFLOW_TEST_DATA") or REPOSITORY.parent / "shared" / "data" / "real")


def _without_mpi() -> str | None:
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install mpi4py mpich"
    return None if find_mpiexec() else f"no mpiexec beside {sys.executable} nor on PATH: pip install mpich"


def _without_strace() -> str | None:
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    trial = subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return None if trial.returncode == 0 else f"strace may not trace here (ptrace): {trial.stderr.strip()[:120]}"


def _without_root() -> str | None:
    if os.geteuid() != 0:
        return "not root: run the tests as root (in a container) to mount small file systems and change user"
    with tempfile.TemporaryDirectory(prefix="emflow-mount-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "emflow-test", folder]
        trial = subprocess.run(mount, capture_output=True, text=True, check=False)
        if trial.returncode != 0:
            return f"root may not mount tmpfs here (CAP_SYS_ADMIN): {trial.stderr.strip()[:120]}"
        subprocess.run(["umount", folder], check=True)
    return None


def _without_peers() -> str | None:
    python = os.environ.get("EMFLOW_PEERS_PYTHON")
    how = "pip install the packages of extra peers (setup.cfg) into an environment, and name its python there"
    if not python:
        return f"EMFLOW_PEERS_PYTHON is not set: {how}"
    code = "import sys, importlib.util as u; sys.exit(' '.join(n for n in sys.argv[1:] if not u.find_spec(n)) or None)"
    try:
        trial = subprocess.run([python, "-c", code, *PEERS], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python} (EMFLOW_PEERS_PYTHON) does not start: {error}; {how}"
    return None if trial.returncode == 0 else f"{python} can't import {trial.stderr.strip()[-120:]}; {how}"


def _without_data() -> str | None:
    folder = data_folder()
    there = (folder / "reference.json").is_file()
    return None if there else f"no reference.json in {folder}: name the folder of real files in EMFLOW_TEST_DATA"


def nvrtc_library() -> Path | None:
    """The library of CUDA's run-time compiler, from the PyPI package; it needs neither a card nor a driver."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return next((found for f in folders for found in sorted(f.glob("cuda_nvrtc/lib/libnvrtc.so.*"))), None)


def _without_nvrtc() -> str | None:
    return None if nvrtc_library() else "NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12"


def _without_cxx() -> str | None:
    return None if shutil.which("g++") else "g++ is not installed: apt-get install g++"


def _without_gpu() -> str | None:
    choice = choose()
    return f"{choice.why}: a machine with an NVIDIA card, and pip install emflow[gpu]" if choice.index is None else None


def _without_native() -> str | None:
    there = importlib.util.find_spec("mpi_kernels._native") is not None
    return None if there else "mpi_kernels._native is not built: install a C compiler, then pip install -e . again"


def _without_slurm() -> str | None:
    from benchmarks import cluster

    return cluster.missing()


def _without_pyslurm() -> str | None:
    there = importlib.util.find_spec("pyslurm") is not None
    how = "pip install pyslurm of the release of the Slurm here, or see tests/integration/slurm/sid.sh"
    return None if there else f"pyslurm is not installed: {how}"


def _without_sid() -> str | None:
    if shutil.which("debootstrap") is None:
        return "debootstrap is not installed: apt-get install debootstrap"
    if reason := _without_root():
        return reason
    mirror = os.environ.get("EMFLOW_DEBIAN_MIRROR", "http://deb.debian.org/debian")
    if (SID / "recipe").exists():
        return None
    try:
        with urllib.request.urlopen(f"{mirror}/dists/sid/InRelease", timeout=20):
            return None
    except OSError as error:
        return f"there is no {SID} yet, and {mirror} (EMFLOW_DEBIAN_MIRROR) does not answer: {error}"


PROBES: dict[str, Callable[[], str | None]] = {
    "mpi": _without_mpi,
    "strace": _without_strace,
    "root": _without_root,
    "peers": _without_peers,
    "data": _without_data,
    "cxx": _without_cxx,
    "nvrtc": _without_nvrtc,
    "gpu": _without_gpu,
    "native": _without_native,
    "slurm": _without_slurm,
    "pyslurm": _without_pyslurm,
    "sid": _without_sid,
}


@functools.cache
def missing(need: str) -> str | None:
    """Why a need is not met, or None; probed once."""
    return PROBES[need]()


def required() -> frozenset[str]:
    """Needs that must be met; a name that is not known is an error, since it would require nothing."""
    names = frozenset(n.strip() for n in os.environ.get("EMFLOW_REQUIRE", "").split(",") if n.strip())
    if unknown := names - PROBES.keys():
        raise pytest.UsageError(f"EMFLOW_REQUIRE: unknown {', '.join(sorted(unknown))}; known: {', '.join(PROBES)}")
    return names


def demand(need: str) -> None:
    """Skip the running test if a need is not met; fail it if EMFLOW_REQUIRE names the need."""
    reason = missing(need)
    if reason is None:
        return
    if need in required():
        pytest.fail(f"EMFLOW_REQUIRE demands {need!r}, but {reason}", pytrace=False)
    pytest.skip(f"needs {need}: {reason}")


# --- pytest's hooks ---------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    required()
    name, value = TOKEN.split("=")
    os.environ[name] = value  # inherited by what the tests start, so that a stray is found even as an orphan
    config.stash[STRAYS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or "slow" in config.getoption("markexpr", ""):
        return
    slow = [i for i in items if i.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if not i.get_closest_marker("slow")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for need in PROBES:
        if item.get_closest_marker(f"needs_{need}"):
            demand(need)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write half characters as escapes: names of files may be any bytes, and a worker of xdist can't send such text."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


# --- no process outlives the run --------------------------------------------------------------------------------------

STRAYS = pytest.StashKey[list[str]]()


def strays(folder: Path) -> dict[int, str]:
    """Live processes that come from this run: descendants, bearers of its token, or at work inside ``folder``."""
    table = {p.pid: p for p in _processes()}
    family = {os.getpid()}
    while more := {p.pid for p in table.values() if p.parent in family} - family:
        family |= more
    found = {p.pid: p.command for p in table.values() if p.pid in family or _belongs(p, folder)}
    found.pop(os.getpid(), None)
    # Python's own helper for shared memory lives until its parent ends
    return {p: c for p, c in found.items() if "multiprocessing.resource_tracker" not in c}


class Process(NamedTuple):
    """What /proc says of a process."""

    pid: int
    parent: int
    terminal: int
    command: str


def _processes() -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent, _, _, terminal = (entry / "stat").read_text().rpartition(")")[2].split()[:5]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except OSError:
            continue
        if state not in "ZX":
            yield Process(int(entry.name), int(parent), int(terminal), command)


def _belongs(process: Process, folder: Path) -> bool:
    proc = Path(f"/proc/{process.pid}")
    try:
        if TOKEN.encode() in (proc / "environ").read_bytes().split(b"\0"):
            return True
        # a process on a terminal may be a person who looks at the folder
        at_work = f"{folder}/" in process.command or (proc / "cwd").readlink().is_relative_to(folder)
        return at_work and process.terminal == 0
    except OSError:
        return False


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    factory = getattr(config, "_tmp_path_factory", None)
    if factory is None or config.getoption("collectonly", default=False):
        return
    if config.pluginmanager.hasplugin("dsession"):  # the tests ran in workers, and each has looked after its own
        if config.stash[STRAYS] and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return
    folder = factory.getbasetemp()
    until = time.monotonic() + GRACE_S
    while (left := strays(folder)) and time.monotonic() < until:
        time.sleep(0.05)
    config.stash[STRAYS] += [f"{pid}: {command[:160]}" for pid, command in left.items()]
    if (output := getattr(config, "workeroutput", None)) is not None:  # a worker of xdist tells its controller
        output["strays"] = config.stash[STRAYS]
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of xdist has ended, and said what its tests left."""
    node.config.stash[STRAYS] += getattr(node, "workeroutput", {}).get("strays", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left := config.stash[STRAYS]:
        terminalreporter.section("PROCESSES LEFT RUNNING BY THE TESTS: the run has failed", red=True)
        terminalreporter.write_line("\n".join(left))


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real microscope files; read there, never copied into the repository."""
    demand("data")
    return data_folder()


@pytest.fixture(scope="session")
def reference(real_data: Path) -> dict[str, dict[str, Any]]:
    """The independent reference of each real dataset, by its id, such as ``mib/001_4x2_6bit``."""
    entries = json.loads((real_data / "reference.json").read_text(encoding="utf-8"))["datasets"]
    return {entry["id"]: entry for entry in entries}


@pytest.fixture(scope="session")
def cxx() -> str:
    """Path of the C++ compiler."""
    demand("cxx")
    return str(shutil.which("g++"))


@pytest.fixture(scope="session")
def nvrtc() -> Path:
    """The library of CUDA's run-time compiler."""
    demand("nvrtc")
    found = nvrtc_library()
    assert found is not None
    return found


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of two virtual nodes with 4 cores each; a test that hurts its daemons starts one of its own."""
    demand("slurm")
    from benchmarks import cluster

    with cluster.running(tmp_path_factory.mktemp("slurm") / "cluster") as found:
        yield found


@pytest.fixture(scope="session")
def sid_folder() -> Path:
    """Where the chroot of Debian sid lies, or will."""
    demand("sid")
    return SID


@pytest.fixture(scope="session")
def mpiexec() -> str:
    """Path of mpiexec."""
    demand("mpi")
    return str(find_mpiexec())
