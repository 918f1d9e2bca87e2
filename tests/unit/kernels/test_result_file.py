"""The result file's own layer: what HDF5 writes to, and nodes that are written by low-level calls."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpi_kernels import backing, hdf5_nodes
from mpi_kernels.backing import Backing

VALUES: dict[str, Any] = {
    "text": "µm",
    "empty": "",
    "list": ["scan_y", "scan_x"],
    "int": 3,
    "large": (1 << 64) - 1,
    "float": float("nan"),
    "bool": True,
    "shape": np.array([3, 4], np.int64),
    "map": np.arange(12.0).reshape(3, 4),
    "turned": np.arange(4096, dtype=np.uint16).reshape(64, 64).T,
    "wide": np.random.default_rng(0).random((64, 64)),
    "nothing": np.zeros((0, 5), np.float32),
}


class Small:
    """A file that can't grow beyond a limit, without a mount."""

    def __init__(self, file: Any, limit: int) -> None:
        self._file, self._limit = file, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, view: memoryview) -> int:
        if self._file.tell() + len(view) > self._limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(view)


def facts(at: Any) -> dict[str, tuple[object, ...]]:
    """All that a reader sees of attributes."""
    return {k: (at.attrs.get_id(k).get_type(), at.attrs.get_id(k).shape, repr(at.attrs[k])) for k in at.attrs}


def test_nodes_are_those_that_h5py_itself_makes() -> None:
    ours, theirs = h5py.File(io.BytesIO(), "w"), h5py.File(io.BytesIO(), "w")
    group = hdf5_nodes.group(ours.id, "é", units="nm", **VALUES)
    made = {name: hdf5_nodes.dataset(group, name, value, unit="counts") for name, value in VALUES.items()}
    hdf5_nodes.hard_link(group, "same", made["map"])
    hdf5_nodes.soft_link(group, "soft", "/é/wide")
    other = theirs.create_group("é")
    other.attrs.update({"units": "nm"} | VALUES)
    for name, value in VALUES.items():
        other[name] = value
        other[name].attrs["unit"] = "counts"
    assert facts(ours["é"]) == facts(other)
    assert set(ours["é"]) == {*VALUES, "same", "soft"}
    for name in VALUES:
        a, b = ours["é"][name], other[name]
        assert (a.dtype, a.shape, a.id.get_type()) == (b.dtype, b.shape, b.id.get_type())
        assert repr(a[()]) == repr(b[()])
        assert facts(a) == facts(b)
        assert not a.id.get_create_plist().get_obj_track_times()
    assert ours["é/same"] == ours["é/map"]
    assert ours["é"].get("soft", getlink=True).path == "/é/wide"


def test_what_is_printed_of_attributes_is_one_line() -> None:
    file = h5py.File(io.BytesIO(), "w")
    hdf5_nodes.attributes(file.id, path="a\nb \udcff")
    assert file.attrs["path"] == r"a\nb \udcff"


@pytest.mark.parametrize("held", [0, 100_000, 1 << 30])
def test_the_file_is_the_same_whether_memory_held_it_or_not(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing, "HELD_BYTES", held)
    data = np.random.default_rng(0).random((3, 20_000))
    made = Backing(tmp_path / "a.h5")
    with h5py.File(made, "w") as file:
        for name, values in zip("abc", data, strict=True):
            hdf5_nodes.dataset(file.id, name, values, unit="counts")
        file.create_dataset("late", (30_000,), "f8")  # a place that nothing is written to
    assert (tmp_path / "a.h5").exists() == (held < 1 << 30)
    digest = made.finish()
    made.close()
    whole = (tmp_path / "a.h5").read_bytes()
    assert digest == hashlib.sha256(whole).hexdigest()
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal([file[name][()] for name in "abc"], data)
        assert not file["late"][()].any()
    again = io.BytesIO()
    with h5py.File(again, "w") as file:
        for name, values in zip("abc", data, strict=True):
            hdf5_nodes.dataset(file.id, name, values, unit="counts")
        file.create_dataset("late", (30_000,), "f8")
    assert whole == again.getvalue()


def test_memory_extends_as_a_file_does(tmp_path: Path) -> None:
    made = Backing(tmp_path / "a")
    made.write(memoryview(b"abc"))
    made.truncate(5)
    made.seek(7)
    made.write(memoryview(b"d"))
    made.truncate(10)
    made.finish()
    made.close()
    assert (tmp_path / "a").read_bytes() == b"abc\0\0\0\0d\0\0"


@pytest.mark.parametrize("held", [0, 1_000_000, 1 << 30])
def test_an_error_while_hdf5_writes_waits_until_it_is_done(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing, "HELD_BYTES", held)
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Small(real(self, *a, **k), 300_000))
    made = Backing(tmp_path / "a.h5")
    data = np.random.default_rng(0).random(50_000)
    with h5py.File(made, "w") as file:
        for name in "abcde":
            file[name] = data
    with pytest.raises(OSError, match="No space left"), contextlib.closing(made):  # it is closed on the way out
        made.finish()
