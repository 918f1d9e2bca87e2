"""A copy of a file that grows, when somebody has touched it: the file is copied as usual, and never taken for whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from emflow.growing_copy import Grid, GrowingCopy


def _removed(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("more", [b"", b"the rest"])
@pytest.mark.parametrize("harm", [_removed, _cut, _longer])
def test_a_copy_that_is_not_as_it_was_left_is_not_taken(
    tmp_path: Path, harm: Callable[[Path], None], more: bytes
) -> None:
    source = tmp_path / "scan.raw"
    source.write_bytes(b"0123456789")
    members = ((str(source), b"scan.raw", ".raw"),)
    (tmp_path / "copies").mkdir()
    copy = GrowingCopy(members, tmp_path / "copies", "a" * 16, Grid(0, 5, 4), 0, lambda _: None)
    copy._catch_up(None)
    harm(copy.path)
    source.write_bytes(b"0123456789" + more)
    assert copy.finished(members) is None
    assert "is not as it was left" in copy.failed
