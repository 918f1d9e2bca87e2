"""Results as they are found and read: real ones, made by the kernels in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from emflow.acquisition_file import AcquisitionFile
from emflow.agent import evidence
from emflow.agent.evidence import Finder, Wanted, examine, first_complete
from emflow.agent.folders import existing, find, folder_of, held
from emflow.agent.policies.threshold import Threshold
from emflow.agent.results import LoadedResult, ResultError, read_once, reload
from emflow.errors import Busy, UsageError
from emflow.records import Fingerprint, Transfer
from emflow.runs import RunFolders
from mpi_kernels.contract import JobSpec, Recipe, ReductionSpec, SourceSpec
from mpi_kernels.job import run
from mpi_kernels.ranks import Ranks

A = "0123456789abcdef"
R = "mpi_kernels.reductions"
RECIPE = Recipe(
    name="quick",
    reductions=(
        ReductionSpec(use=f"{R}.virtual_image:VirtualImage", name="bright_field"),
        ReductionSpec(use=f"{R}.pattern:Pattern", name="pattern", parameters={"variance": False}),
        ReductionSpec(use=f"{R}.image:Image", name="image"),
    ),
)
NAMES = tuple(r.name for r in RECIPE.reductions)
DATA = np.arange(3 * 4 * 6 * 8, dtype=np.uint16).reshape(3, 4, 6, 8)


def reduced(
    root: Path, data: np.ndarray = DATA, *, day: str = "2024-02-29", attempt: int = 1, digest: str | None = None
) -> Path:
    """A finished run folder."""
    root.mkdir(exist_ok=True)
    source = root / f"{A}.npy"
    np.save(source, data)
    spec = JobSpec(
        job=f"{A}-{attempt:02d}",
        acquisition=A,
        trace=A,
        recipe=RECIPE,
        source=SourceSpec(path=str(source), format="mpi_kernels.formats.npy:Npy", digest=digest),
    )
    folder = RunFolders(root).write_job(spec, day)
    run(folder, Ranks())
    return folder


def wanted(**facts: object) -> Wanted:
    return Wanted(**({"acquisition": A, "command": None, "settings": {"C10_nm": 3.0}} | facts))  # type: ignore[arg-type]


def test_a_result_as_a_policy_sees_it(tmp_path: Path) -> None:
    seen, result = examine(tmp_path, reduced(tmp_path), wanted(), Threshold(), NAMES)
    assert result is not None, seen.distrusted
    assert (result.job, result.coverage, result.quality, result.settings) == (f"{A}-01", 1.0, "OK", {"C10_nm": 3.0})
    np.testing.assert_array_equal(result.array("pattern/sum"), DATA.sum((0, 1)))
    assert result.array("bright_field/image").shape == (3, 4)
    assert [(a.name, a.scale, a.offset, a.unit) for a in result.axes("pattern/sum")] == [
        *(("det_y", 1.0, 0.0, "px"), ("det_x", 1.0, 0.0, "px"))
    ]
    assert result.scalars["pattern"]["total"] == int(DATA.sum())
    with pytest.raises(KeyError, match=r"no map 'pattern/none'.*bright_field/image, pattern/sum"):
        result.array("pattern/none")
    result.close()
    again = reload(tmp_path, seen)
    np.testing.assert_array_equal(again.array("/pattern/sum"), DATA.sum((0, 1)))
    again.close()
    path = tmp_path / seen.path
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ResultError, match="changed since it was decided on"):
        reload(tmp_path, seen)
    path.unlink()
    with pytest.raises(ResultError, match="No such file"):
        reload(tmp_path, seen)
    with pytest.raises(ResultError, match="no result file"):
        LoadedResult(seen, b"nothing")


@pytest.mark.parametrize("shape", [(1, 1, 6, 8), (3, 1, 1, 8)])
def test_axes_of_one_position(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = np.arange(1, 1 + np.prod(shape), dtype=np.uint16).reshape(shape)
    _, result = examine(tmp_path, reduced(tmp_path, data), wanted(), Threshold(), NAMES)
    assert result is not None
    for name, count in (("bright_field/image", shape[:2]), ("pattern/sum", shape[2:])):
        assert result.array(name).shape == count
        assert [a.scale for a in result.axes(name)] == [1.0, 1.0]
    result.close()


@pytest.mark.parametrize(
    ("facts", "names", "told"),
    [
        ({"acquisition": "f" * 16}, NAMES, "but lies where"),
        ({"command": "e0123456789ab-0000-00"}, NAMES, f"it is of command {A}"),
        ({"used": frozenset({A})}, NAMES, "was decided on before"),
        ({"used": frozenset({f"{A}-01"})}, NAMES, "was decided on before"),
        ({"changed": ("C10_nm",)}, NAMES, "C10_nm changed while"),
        ({}, ("bright_field", "segments"), "it has no segments"),
        ({}, ("image",), "it has no image"),  # skipped, since it is no image, and nothing else is there to read
    ],
)
def test_what_is_not_wanted(tmp_path: Path, facts: dict, names: tuple[str, ...], told: str) -> None:
    seen, result = examine(tmp_path, reduced(tmp_path), wanted(**facts), Threshold(), names)
    assert result is None
    assert told in seen.distrusted


@pytest.mark.parametrize(
    ("digest", "told"),
    [("d" * 32, ""), ("e" * 32, "other bytes than those that were copied"), (None, "acquisition.json can't be read")],
)
def test_a_result_is_of_the_bytes_that_were_copied(tmp_path: Path, digest: str | None, told: str) -> None:
    folder = reduced(tmp_path, digest="d" * 32)
    copied = AcquisitionFile(
        id=A,
        share="s",
        relpath=b"x",
        generation=0,
        day="2024-02-29",
        trace=A,
        seen_ns=1,
        staged_ns=1,
        fingerprint=Fingerprint(size=1, mtime_ns=1, ctime_ns=1),
        format="npy",
        kind="4d",
        frames=12,
        supersedes=None,
        transfer=Transfer(path="x", bytes=1, digest=digest or "", seconds=0.0, members=()),
    )
    (folder.parent / "acquisition.json").write_bytes(copied.encode()[: None if digest else 40])
    seen, result = examine(tmp_path, folder, wanted(), Threshold(), NAMES)
    assert (result is None) is bool(told)
    assert told in seen.distrusted
    if result is not None:
        result.close()


def test_a_result_of_another_recipe_under_the_same_names(tmp_path: Path) -> None:
    folder = reduced(tmp_path)
    made_by = (*RECIPE.reductions[:1], dataclasses.replace(RECIPE.reductions[1], parameters={"variance": True}))
    seen, result = examine(tmp_path, folder, wanted(made_by=made_by), Threshold(), NAMES)
    assert result is None
    assert seen.distrusted == "its recipe quick makes pattern otherwise than the policy's"
    _, result = examine(tmp_path, folder, wanted(made_by=RECIPE.reductions[1:]), Threshold(), NAMES)
    assert result is not None
    result.close()
    (folder / "job.json").unlink()
    seen, result = examine(tmp_path, folder, wanted(made_by=made_by), Threshold(), NAMES)
    assert result is None
    assert "job.json can't be read" in seen.distrusted


def test_the_first_complete_attempt_wins(tmp_path: Path) -> None:
    finder = Finder(tmp_path / "runs")
    assert finder.complete(A) is None
    assert list(finder.recent(())) == []
    second = reduced(tmp_path / "runs", attempt=2)
    assert finder.complete(A) is None or finder.complete(A) == second
    finder = Finder(tmp_path / "runs")
    assert finder.complete(A) == second
    (second.parent / "01").mkdir()
    assert finder.complete(A) == second
    assert list(finder.recent(())) == [second]
    assert list(finder.recent({A})) == []
    third = reduced(tmp_path / "runs", attempt=3)
    assert finder.complete(A) == second
    (second / "result.json").unlink()
    assert finder.complete(A) == third == first_complete(third.parent)


def test_an_acquisition_of_an_older_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All days are looked through at first and then now and then; the newest two each time."""
    folder = reduced(tmp_path, day="2023-01-01")
    for n in range(1, 9):
        (tmp_path / f"2024-01-0{n}").mkdir()
    assert Finder(tmp_path).complete(A) == folder
    later = Finder(tmp_path)
    folder.parent.rename(tmp_path / "aside")
    assert later.complete(A) is None
    (tmp_path / "aside").rename(folder.parent)
    assert later.complete(A) is None  # not among the newest two
    monkeypatch.setattr(evidence, "WHOLE_S", 0.0)
    assert later.complete(A) == folder


def test_too_large_a_result(tmp_path: Path) -> None:
    path = tmp_path / "result.h5"
    with path.open("wb") as file:
        file.truncate((4 << 30) + 1)
    with pytest.raises(ResultError, match="too many"):
        read_once(path)


def test_folders_of_experiments(tmp_path: Path) -> None:
    assert existing(tmp_path / "none") == []
    for name in ("e00000000000a", "e00000000000b", "e0000000000bb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("{}\n")
    (tmp_path / "e00000000000c").mkdir()
    assert {f.name for f in existing(tmp_path)} == {"e00000000000a", "e00000000000b", "e0000000000bb"}
    assert find(tmp_path, "e0000000000bb").name == find(tmp_path, "e0000000000b").name == "e0000000000bb"
    assert find(Path("none"), str(tmp_path / "e00000000000a")) == tmp_path / "e00000000000a"
    with pytest.raises(UsageError, match="more than one"):
        find(tmp_path, "e000")
    with pytest.raises(UsageError, match="no experiment is called"):
        find(tmp_path, "")
    for bad in ("../x", "e1", "e0123456789aB", "e0123456789ab\n"):
        with pytest.raises(UsageError, match="is no id"):
            folder_of(tmp_path, bad)
    with held(tmp_path / "e00000000000a"), pytest.raises(Busy, match=r"process \d+ runs it"):
        held(tmp_path / "e00000000000a").__enter__()
