"""A share that is unmounted, mounted again, or not readable for this account."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from emflow.errors import Unavailable
from emflow.watch.scan import Scanner, walk

pytestmark = pytest.mark.needs_root


def mount(folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "emflow-test", str(folder)], check=True)


def test_an_unmounted_share_is_an_alarm_and_a_mounted_one_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "share"
    root.mkdir()
    (root / "local.mib").write_bytes(b"below the mount point, never data")
    now = [0.0]
    scanner = Scanner(root, match=["*.mib"], clock=lambda: now[0])
    mount(root)
    try:
        (root / "a.mib").write_bytes(b"1")
        assert [s.relpath for s in scanner.scan()] == [b"a.mib"]
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)
    for _ in range(2):
        now[0] += 60
        with pytest.raises(Unavailable, match="looks unmounted: another file system"):
            scanner.scan()
    mount(root)
    try:
        now[0] += 60
        with pytest.raises(Unavailable, match="it is empty, and 1 files were known"):
            scanner.scan()
        (root / "a.mib").write_bytes(b"1")
        (root / "b.mib").write_bytes(b"2")
        now[0] += 60
        assert b"b.mib" in [s.relpath for s in scanner.scan()]
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_what_may_not_be_read_is_a_problem_and_the_rest_is_seen() -> None:
    with tempfile.TemporaryDirectory(prefix="emflow-") as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "closed").mkdir(mode=0o700)
        (root / "blind").mkdir(mode=0o744)
        for relpath in ("closed/x.mib", "blind/x.mib", "open.mib", "secret.mib"):
            (root / relpath).write_bytes(b"1")
        (root / "secret.mib").chmod(0o600)
        os.seteuid(65534)
        try:
            found = {s.relpath: s.problem for s in walk(root, match=["*.mib"])}
        finally:
            os.seteuid(0)
        assert sorted(found) == [b"blind", b"closed", b"open.mib", b"secret.mib"]
        assert found.pop(b"open.mib") == ""
        assert all(p.startswith("permission denied: give the account") for p in found.values())
        (root / "secret.mib").chmod(0o644)
        os.seteuid(65534)
        try:
            assert {s.relpath: s.problem for s in walk(root, match=["*.mib"])}[b"secret.mib"] == ""
        finally:
            os.seteuid(0)


def test_a_root_that_may_not_be_read_is_an_alarm() -> None:
    with tempfile.TemporaryDirectory(prefix="emflow-") as name:
        root = Path(name)
        root.chmod(0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(Unavailable, match="permission denied"):
                Scanner(root).scan()
        finally:
            os.seteuid(0)
