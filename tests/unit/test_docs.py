"""The documentation is true: links resolve, examples load, and each reference names exactly what the code has."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import pytest

import emflow.errors
import mpi_kernels.errors
from emflow import config, registry
from emflow.agent.protocol import Ending
from emflow.agent.records import Record
from emflow.cli import COMMANDS, cli
from emflow.microscope import protocol, settings
from emflow.microscope.simulated.parameters import Parameters
from emflow.recipes import load_recipe, recipe_names
from emflow.records import AcquisitionState, JobState
from mpi_kernels import contract, failure, preflight, stopping
from mpi_kernels.plugins import parameter_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
EVERYTHING_ON = {"radial_profile": {"scan": True}}
"""Parameters with which a reduction gives all outputs that it can give."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
every_command = pytest.mark.parametrize("name", COMMANDS)
every_reduction = pytest.mark.parametrize("name", registry.names("reductions"))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Fenced blocks in some languages; "" is one that names none."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it: small letters, punctuation dropped, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def section(page: Path, heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", prose(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {heading!r}"
    return found[1]


def tables(text: str) -> Iterator[list[list[str]]]:
    """Tables as rows of cells, the head first."""
    for table in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in table.splitlines()]
        yield [row for row in rows if not set("".join(row)) <= set("-|: ")]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the tables whose first column has a name, without their heads."""
    return [row for found in tables(text) if found[0][0] == first for row in found[1:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def options(command: click.Command) -> Iterator[click.Option]:
    """The options of a command, and of the commands inside it."""
    yield from (p for p in command.params if isinstance(p, click.Option))
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        yield from options(inner)


def options_of(command: click.Command) -> set[str]:
    return {opt for p in options(command) for opt in (*p.opts, *p.secondary_opts)}


def command_called(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


# --- every page


@every_page
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        known = target.exists() and target.is_relative_to(ROOT)
        if known and fragment:
            known = fragment in map(anchor, headings(target))
        broken += [] if known else [link]
    assert not broken


@every_page
def test_examples_are_valid(page: Path, tmp_path: Path) -> None:
    for body in blocks(page, "toml"):
        value = tomllib.loads(body)
        file = tmp_path / "example.toml"
        file.write_text(body, encoding="utf-8")
        if "reduction" in value:
            assert load_recipe(str(file), relative_to=tmp_path).name == value["name"]
        else:
            assert len(config.load(file).watch) == len(value["watch"])
    for body in blocks(page, "json"):
        json.loads(body)
    for body in blocks(page, "python"):
        ast.parse(body)


@every_page
def test_commands_exist_with_their_options(page: Path) -> None:
    for body in blocks(page, "bash", ""):
        for line in body.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if re.match(r"(\S+/)?emflow ", part):
                    check_line(shlex.split(part, comments=True)[1:])
            for name in re.findall(r"-m benchmarks (\w+)", line):
                assert (ROOT / "benchmarks" / f"{name}.py").exists(), line


def check_line(arguments: list[str]) -> None:
    """Let click take the line apart; it raises on what it does not know."""
    _, rest, _ = cli.make_parser(click.Context(cli)).parse_args(arguments)
    if not rest:
        return
    assert rest[0] in COMMANDS, arguments
    command = command_called(rest[0])
    _, rest, _ = command.make_parser(click.Context(command)).parse_args(rest[1:])
    if isinstance(command, click.Group) and rest:
        inner = command.commands[rest[0]]
        inner.make_parser(click.Context(inner)).parse_args(rest[1:])


@pytest.mark.parametrize("name", ["pool", "microscope", "agent"])
def test_commands_of_groups_are_documented(name: str) -> None:
    group = command_called(name)
    assert isinstance(group, click.Group)
    rows = table(section(REFERENCE / "commands.md", f"emflow {name}"), "command")
    assert {code(row[0])[0].split(" ")[0] for row in rows} == set(group.commands)


def test_a_wrong_line_is_found() -> None:
    with pytest.raises(click.NoSuchOption):
        check_line(["run", "--twice"])
    with pytest.raises(AssertionError):
        check_line(["-c", "a.toml", "stats"])


def test_every_page_is_linked_from_the_index() -> None:
    linked = {(index.parent / link).resolve() for index in DOCS.rglob("index.md") for link in links(index)}
    missing = [p.name for p in DOCS.rglob("*.md") if p.resolve() not in linked and p != DOCS / "index.md"]
    assert not missing


def links(page: Path) -> list[str]:
    return [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))]


# --- reference/commands.md


def test_documented_commands_are_the_commands() -> None:
    documented = [h.removeprefix("emflow ") for h in headings(REFERENCE / "commands.md") if h.startswith("emflow ")]
    assert documented == list(COMMANDS)


@every_command
def test_every_option_is_documented_and_no_other(name: str) -> None:
    text = section(REFERENCE / "commands.md", f"emflow {name}")
    rows = table(text, "option")
    documented = {option for row in rows for option in code(row[0])}
    known = options_of(command_called(name)) - {"--help", "-h"}
    assert documented == known
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert mentioned <= known | options_of(cli)


@every_command
def test_defaults_of_options(name: str) -> None:
    rows = table(section(REFERENCE / "commands.md", f"emflow {name}"), "option")
    for parameter in options(command_called(name)):
        if not parameter.show_default:
            continue
        row = next(r for r in rows if parameter.opts[-1] in code(r[0]))
        assert row[1].strip("`") == str(parameter.default), parameter.opts


def test_options_of_emflow_itself() -> None:
    text = prose(REFERENCE / "commands.md").partition("\n## ")[0]
    documented = {option for row in table(text, "option of `emflow` itself") for option in code(row[0])}
    assert documented == options_of(cli) | {"-h", "--help"}


def test_exit_codes_are_documented() -> None:
    errors = [getattr(emflow.errors, name) for name in emflow.errors.__all__ if name[0].isupper()]
    codes = {str(error.exit_code) for error in errors} | {"0", "130", "143"}
    head = prose(REFERENCE / "commands.md").partition("\n## ")[0]
    assert codes <= set(re.findall(r"\b\d+\b", head))
    rows = table(section(DOCS / "how-to" / "administrator.md", "Exit codes"), "code")
    assert {number for row in rows for number in re.findall(r"\d+", row[0])} == codes


# --- reference/configuration.md

TABLES = {
    "`[service]`": config.ServiceSettings,
    "`[[watch]]`": config.Watch,
    "`[scan]`": config.ScanSettings,
    "`[transfer]`": config.TransferSettings,
    "`[scheduler]`": config.SchedulerSettings,
    "`[slurm]`": config.SlurmSettings,
    "`[pool]`": config.PoolSettings,
    "`[caps]`": config.CapSettings,
    "`[kernels]`": config.KernelSettings,
    "`[microscope]`": config.MicroscopeSettings,
    "`[agent]`": config.AgentSettings,
    "`[log]`": config.LogSettings,
}


def test_tables_of_the_configuration() -> None:
    documented = [h for h in headings(REFERENCE / "configuration.md") if h.startswith("`[")]
    assert documented == list(TABLES)
    own = {f.name for f in msgspec.structs.fields(config.Config)} - {"folder"}
    assert {h.strip("`[]") for h in documented} == own


@pytest.mark.parametrize("heading", TABLES)
def test_keys_of_the_configuration(heading: str) -> None:
    rows = {code(row[0])[0]: row[1] for row in table(section(REFERENCE / "configuration.md", heading), "key")}
    fields = {f.name: f for f in msgspec.structs.fields(TABLES[heading])}
    assert list(rows) == list(fields)
    for name, field in fields.items():
        if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT:
            assert rows[name] == "required"
        else:
            assert same(toml(rows[name]), field.default), f"{name}: {rows[name]} is not {field.default!r}"


def toml(cell: str) -> Any:
    return tomllib.loads(f"value = {code(cell)[0]}")["value"]


def same(written: Any, default: Any) -> bool:
    if isinstance(default, config.Bytes):
        return config.parse_size(written) == default
    if isinstance(written, list):
        return tuple(written) == tuple(default)
    return bool(written == (str(default) if isinstance(default, Path) else default))


def test_choices_of_the_configuration() -> None:
    page = REFERENCE / "configuration.md"
    for heading, struct in TABLES.items():
        for field in msgspec.structs.fields(struct):
            for choice in get_args(field.type):
                if isinstance(choice, str):
                    assert f'`"{choice}"`' in section(page, heading), (field.name, choice)
    for name in registry.names("schedulers"):
        assert f'`"{name}"`' in section(page, "`[scheduler]`")


# --- reference/recipes.md


@every_reduction
def test_parameters_of_reductions(name: str) -> None:
    cls = registry.load("reductions", name)
    rows = table(section(REFERENCE / "recipes.md", name), "parameter")
    assert [code(row[0])[0] for row in rows] == list(parameter_names(cls))
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    for row in rows:
        assert len(row) == 4, row
        default = defaults[code(row[0])[0]]
        if row[2].startswith("`"):
            assert toml(row[2]) == default, row
        else:  # what a missing value stands for, in words
            assert default is None, row


@every_reduction
def test_outputs_of_reductions(name: str) -> None:
    cls = registry.load("reductions", name)
    kind: Any = "4d" if "4d" in cls.kinds else next(iter(cls.kinds))
    scan = {"4d": (3, 4), "stack": (12,), "image": ()}[kind]
    header = contract.Header(
        format="npy", kind=kind, scan_shape=scan, det_shape=(8, 8), dtype="uint16", members=(), rule="exact"
    )
    outputs = cls(**EVERYTHING_ON.get(name, {})).outputs(header)
    rows = {code(row[0])[0]: row for row in table(section(REFERENCE / "recipes.md", name), "output")}
    assert set(rows) == set(outputs)
    for output, declared in outputs.items():
        _, _, dtype, unit = rows[output]
        assert unit == declared.unit, output
        words = {"whole": "uint64", "the data's": "uint16"}
        said = dtype.split(";")[0]
        assert words.get(said, said.strip("`")) == declared.dtype, output


def test_built_in_recipes_are_documented() -> None:
    text = prose(REFERENCE / "recipes.md")
    for name in recipe_names():
        assert f"`{name}`" in text
        for reduction in load_recipe(name, relative_to=ROOT).reductions:
            assert f"`{reduction.name}`" in text


# --- the other references


def test_formats_are_documented() -> None:
    page = REFERENCE / "formats.md"
    rows = {row[0]: row for row in table(prose(page), "format")}
    for name in registry.names("formats"):
        suffixes = code(rows[f"[`{name}`](#{name})"][1])[0].split(" ")
        assert sorted(suffixes) == sorted(registry.load("formats", name).suffixes)
        text = section(page, name)
        for part in ("Complete", "Refused"):
            assert f"**{part}**" in text, (name, part)
    assert len(rows) == len(registry.names("formats"))


def test_files_of_a_run_folder_are_documented() -> None:
    text = prose(REFERENCE / "run-folder.md")
    names = [n for n, value in vars(contract).items() if n.endswith("_FILE") and isinstance(value, str)]
    assert len(names) > 5
    for name in (*names, "RESULT_H5"):
        assert f"`{getattr(contract, name)}`" in text


@pytest.mark.parametrize(
    ("heading", "record"), [("result.json", contract.ResultManifest), ("error.json", contract.ErrorRecord)]
)
def test_fields_of_records(heading: str, record: Any) -> None:
    rows = table(section(REFERENCE / "run-folder.md", heading), "field")
    documented = [field for row in rows for field in code(row[0])]
    assert sorted(documented) == sorted(f.name for f in dataclasses.fields(record) if f.name != "v")


@pytest.mark.parametrize(
    ("heading", "first", "record"),
    [
        ("Command", "field", protocol.Command),
        ("Receipt", "field", protocol.Receipt),
        ("Its file", "key", None),
        ("The simulated microscope", "parameter", Parameters),
    ],
)
def test_fields_of_the_control_plane(heading: str, first: str, record: Any) -> None:
    rows = table(section(REFERENCE / "microscope.md", heading), first)
    documented = [field for row in rows for field in code(row[0])]
    if record is None:
        structs: tuple[Any, ...] = (settings.ServerSettings, settings.BackendSettings, settings.Limits)
        names = [f.name for one in (*structs, settings.ControlLimits) for f in msgspec.structs.fields(one)]
    else:
        names = [f.name for f in msgspec.structs.fields(record) if f.name != "v"]
    assert sorted(documented) == sorted(names)


def test_outcomes_verbs_and_endings_are_documented() -> None:
    page = REFERENCE / "microscope.md"
    outcomes = [code(row[0])[0] for row in table(section(page, "Receipt"), "outcome")]
    assert outcomes == [outcome.value for outcome in protocol.Outcome]
    assert {code for code in protocol.NOT_ADMITTED if f"`{code}`" not in section(page, "Receipt")} == set()
    verbs = [code(row[0])[0] for row in table(section(page, "Actions"), "verb")]
    assert verbs == [str(action.__struct_config__.tag) for action in get_args(protocol.Action)]
    endings = [e for row in table(section(REFERENCE / "experiment.md", "Why it ends"), "ending") for e in code(row[0])]
    assert endings == [ending.value for ending in Ending]
    records = [code(row[0])[0] for row in table(prose(REFERENCE / "experiment.md"), "record")]
    assert records == [str(record.__struct_config__.tag) for record in get_args(Record)]


def test_error_codes_are_documented() -> None:
    rows = table(section(REFERENCE / "run-folder.md", "error.json"), "code")
    documented = {name: row[2] for row in rows for name in code(row[0])}
    classes = [e for e in vars(mpi_kernels.errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    others = (failure.Stopped, preflight.Preflight, preflight.Golden, stopping.TimeLimit)
    known = {cls.code: cls.retryable for cls in (*classes, *others)}
    known |= dict.fromkeys(failure.OS_CODES.values(), False)
    known |= {"memory": True, "no-space": True, "io": True, "unexpected": False}
    assert {name: again.startswith("yes") for name, again in documented.items()} == known


def test_events_are_documented() -> None:
    documented = {(code(row[0])[0], row[1]) for row in table(prose(REFERENCE / "events.md"), "name")}
    moves = {state.lower() for state in (*AcquisitionState, *JobState)}
    assert {(name, "management") for name in moves} <= documented
    kernels = re.findall(r"""_event\(\s*["'](\w+)["']""", text_of(ROOT / "mpi_kernels" / "job.py"))
    assert {("claimed", "data"), ("written", "data")} <= {(name, "data") for name in kernels} <= documented
    beside = [*(ROOT / "emflow" / "agent").glob("*.py"), *(ROOT / "emflow" / "microscope").glob("*.py")]
    control = {name for path in beside for name in re.findall(r'events\.write\(\s*"(\w+)"', text_of(path))}
    assert {"sent", "began", "noted", "decided"} <= control
    own = {(name, "control") for name in control}
    own |= {("noticed", "management"), ("rebuilt", "management"), ("alarm", "management"), ("cleared", "management")}
    assert documented == {(name, "management") for name in moves} | {(name, "data") for name in kernels} | own


def test_options_of_benchmarks_are_documented() -> None:
    rows = {code(row[0])[0]: row[2] for row in table(prose(DOCS / "how-to" / "benchmark.md"), "benchmark")}
    for name, cell in rows.items():
        known = re.findall(r'add_argument\(\s*"(--[a-z-]+)"', text_of(ROOT / "benchmarks" / f"{name}.py"))
        assert code(cell)[0].split(" ") == known
    assert {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")} - {"machine", "cluster"} == set(rows)
