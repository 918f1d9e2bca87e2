"""Choosing: who wins, and what is said of things that are no data."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from emflow.synthetic import ExactScan, write_empad, write_nion_h5, write_npy, write_raw
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, NotThisFormat
from mpi_kernels.formats.choose import choose
from mpi_kernels.formats.empad import Empad
from mpi_kernels.formats.hdf5 import Hdf5
from mpi_kernels.formats.merlin import Merlin
from mpi_kernels.formats.npy import Npy
from mpi_kernels.formats.raw import Raw
from mpi_kernels.protocols import Format, Source

FORMATS: dict[str, Format] = {"empad": Empad(), "hdf5": Hdf5(), "merlin": Merlin(), "npy": Npy(), "raw": Raw()}
SCAN = ExactScan((2, 3), (4, 5))


class Says:
    """A third party's format that always says the same."""

    suffixes: ClassVar[tuple[str, ...]] = (".x",)

    def __init__(self, answer: KernelError | Header) -> None:
        self.answer = answer

    def probe(self, path: str) -> Header:
        if isinstance(self.answer, KernelError):
            raise self.answer
        return self.answer

    def open(self, path: str) -> Source:
        raise NotImplementedError


NOT, NEVER, LATER = NotThisFormat("not mine"), FormatError("never"), Incomplete("later")


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        ([NOT, NEVER], NEVER),
        ([NEVER, NOT], NEVER),
        ([NEVER, LATER], LATER),
        ([LATER, NEVER], LATER),
        ([NOT, LATER, NEVER], LATER),
    ],
)
def test_who_wins(tmp_path: Path, answers: list[KernelError], winner: KernelError) -> None:
    path = tmp_path / "a.x"
    path.write_bytes(b"1")
    known = {str(i): Says(a) for i, a in enumerate(answers)}
    with pytest.raises(KernelError) as caught:
        choose(os.fspath(path), known)
    assert caught.value is winner
    header = Npy().probe(os.fspath(write_npy(SCAN, tmp_path / "a.npy")))
    assert choose(os.fspath(path), {**known, "last": Says(header)}) == ("last", header)


def test_the_suffix_does_not_matter_to_a_format_that_knows_the_bytes(tmp_path: Path) -> None:
    for write, suffix, name in ((write_npy, "npy", "npy"), (write_nion_h5, "h5", "hdf5")):
        path = write(SCAN, tmp_path / f"a.{suffix}")
        for other in ("a", "b.unknown", f"c.{suffix.upper()}"):
            shutil.copyfile(path, tmp_path / other)
            assert choose(os.fspath(tmp_path / other), FORMATS)[0] == name


def test_raw_and_empad_share_a_suffix(tmp_path: Path) -> None:
    empad = ExactScan((2, 3), (128, 128), "float32")
    assert choose(os.fspath(write_empad(empad, tmp_path / "e.raw")), FORMATS)[0] == "empad"
    assert choose(os.fspath(write_raw(SCAN, tmp_path / "r.raw")), FORMATS)[0] == "raw"
    (tmp_path / "r.json").unlink()
    with pytest.raises(Incomplete, match="sidecar"):
        choose(os.fspath(tmp_path / "r.raw"), FORMATS)


def test_a_foreign_file_lists_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(NotThisFormat) as caught:
        choose(os.fspath(path), FORMATS)
    for name, known in FORMATS.items():
        assert name in caught.value.next_step
        assert known.suffixes[0] in caught.value.next_step


@pytest.mark.parametrize("suffix", [".npy", ".raw", ".mib", ".h5", ".txt"])
def test_things_that_are_no_files(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"broken{suffix}").symlink_to(tmp_path / "gone")
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (tmp_path / f"empty{suffix}").touch()
    os.mkfifo(tmp_path / f"pipe{suffix}")
    for stem, kind, words in (
        ("folder", FormatError, "folder"),
        ("broken", FormatError, "link to .*gone"),
        ("loop", FormatError, "symbolic links"),
        ("missing", FormatError, "No such file"),
        ("empty", Incomplete, "empty"),
        ("pipe", FormatError, "regular file"),
        ("x" * 300, FormatError, "too long"),
        ("nul\0", FormatError, "NUL"),
    ):
        path = os.fspath(tmp_path / f"{stem}{suffix}")
        for call in (
            lambda p=path: choose(p, FORMATS),
            *(lambda p=path, f=f: f.probe(p) for n, f in FORMATS.items() if suffix in f.suffixes),
            *(lambda p=path, f=f: f.open(p) for n, f in FORMATS.items() if suffix in f.suffixes),
        ):
            with pytest.raises(kind, match=words) as caught:
                call()
            assert type(caught.value) is kind
            assert caught.value.path == path
            assert caught.value.next_step


@pytest.fixture
def somebody_else() -> Iterator[Path]:
    """A folder that all may enter, and nobody's rights for the time of the test if it runs as root."""
    folder = Path(tempfile.mkdtemp(prefix="emflow-permission-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("suffix", ["npy", "h5", "raw", "json"])
def test_no_permission(somebody_else: Path, suffix: str) -> None:
    for write, own in ((write_npy, "npy"), (write_nion_h5, "h5"), (write_raw, "raw")):
        write(SCAN, somebody_else / f"a.{own}")
    closed = somebody_else / f"a.{suffix}"
    closed.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(FormatError, match="Permission denied") as caught:
            choose(os.fspath(somebody_else / f"a.{'raw' if suffix == 'json' else suffix}"), FORMATS)
    finally:
        if user == 0:
            os.seteuid(0)
        closed.chmod(0o600)
    assert caught.value.path == os.fspath(closed)
    assert "permission" in caught.value.next_step
