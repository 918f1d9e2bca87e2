import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emflow.watch.hints import RESCAN
from emflow.watch.inotify import InotifyHints
from emflow.watch.scan import Scanner

BURST = 20_000


@pytest.fixture
def hints(tmp_path: Path) -> Iterator[InotifyHints]:
    made = InotifyHints(tmp_path)
    made.arm()
    assert made.wait(0) is RESCAN
    yield made
    made.close()


def until(hints: InotifyHints, folder: bytes) -> None:
    """Wait until a folder is called dirty."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        dirty = hints.wait(1)
        if dirty is RESCAN or folder in dirty:
            return
    pytest.fail(f"{folder!r} was never called dirty")


def collect(scanner: Scanner, hints: InotifyHints, enough: Callable[[set[bytes]], bool]) -> set[bytes]:
    """Scan when hints say so, and never otherwise."""
    found: set[bytes] = set()
    deadline = time.monotonic() + 30
    while not enough(found) and time.monotonic() < deadline:
        dirty = hints.wait(max(0.0, min(1.0, scanner.next_due() - time.monotonic())))
        scanner.mark(dirty, hints.closed())
        found |= {s.relpath for s in scanner.scan()}
    return found


def test_create_close_and_rename_are_told_with_their_folder(tmp_path: Path, hints: InotifyHints) -> None:
    (tmp_path / "d").mkdir()
    until(hints, b"d")
    file = (tmp_path / "d" / "x.mib").open("wb")
    assert hints.wait(1) == {b"d"}
    assert hints.closed() == frozenset()
    file.close()
    assert hints.wait(1) == {b"d"}
    assert hints.closed() == {b"d/x.mib"}
    assert hints.closed() == frozenset()
    (tmp_path / "d" / "x.mib").rename(tmp_path / "y.mib")
    assert hints.wait(1) == {b""}
    assert hints.closed() == {b"y.mib"}


def test_temporaries_and_readers_are_not_worth_a_hint(tmp_path: Path, hints: InotifyHints) -> None:
    (tmp_path / ".x.mib.part").write_bytes(b"1")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.mib").write_bytes(b"1")
    hints.wait(0)
    (tmp_path / ".x.mib.part").read_bytes()
    assert hints.wait(0) == frozenset()
    assert hints.closed() == frozenset()


def test_names_that_are_not_text_pass(tmp_path: Path, hints: InotifyHints) -> None:
    for name in (b"\xff\xfe.mib", b"new\nline.mib", b"x" * 251 + b".mib"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"1")
        hints.wait(1)
        assert hints.closed() == {name}


def test_a_folder_moved_in_brings_all_that_is_below(tmp_path: Path) -> None:
    share, outside = tmp_path / "share", tmp_path / "outside"
    share.mkdir()
    (outside / "deep" / "er").mkdir(parents=True)
    (outside / "deep" / "er" / "x.mib").write_bytes(b"1")
    hints = InotifyHints(share)
    hints.arm()
    hints.wait(0)
    outside.rename(share / "in")
    until(hints, b"in/deep/er")
    (share / "in" / "deep" / "er" / "y.mib").write_bytes(b"1")
    assert hints.wait(1) == {b"in/deep/er"}
    hints.close()


def test_a_folder_moved_out_falls_silent_and_a_renamed_one_has_its_new_name(tmp_path: Path) -> None:
    share = tmp_path / "share"
    (share / "a" / "b").mkdir(parents=True)
    hints = InotifyHints(share)
    hints.arm()
    hints.wait(0)
    (share / "a").rename(share / "c")
    until(hints, b"c/b")
    (share / "c" / "b" / "x.mib").write_bytes(b"1")
    assert hints.wait(1) == {b"c/b"}
    (share / "c").rename(tmp_path / "out")
    until(hints, b"")
    (tmp_path / "out" / "b" / "y.mib").write_bytes(b"1")
    assert hints.wait(0.05) == frozenset()
    hints.close()


def test_an_overflow_asks_for_a_rescan_and_loses_nothing(tmp_path: Path, hints: InotifyHints) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit >= BURST:
        pytest.skip(f"the queue holds {limit} events: {BURST} do not overflow it")
    scanner = Scanner(tmp_path, recent_s=3600, whole_s=3600)
    scanner.scan()
    for number in range(BURST):  # nobody reads the queue meanwhile
        os.close(os.open(tmp_path / f"{number}.mib", os.O_CREAT | os.O_WRONLY))
    (tmp_path / "late").mkdir()
    assert hints.wait(1) is RESCAN
    scanner.mark(RESCAN)
    found = collect(scanner, hints, lambda found: len(found) >= BURST)
    assert len(found) == BURST
    (tmp_path / "late" / "x.mib").write_bytes(b"1")  # its creation was among the lost events
    until(hints, b"late")
    assert hints.live
    assert hints.degraded == ""


def test_nested_folders_raced_by_a_writer_lose_nothing(tmp_path: Path, hints: InotifyHints) -> None:
    scanner = Scanner(tmp_path, recent_s=3600, whole_s=3600)
    scanner.scan()
    wanted = {f"{i}/a/b/{j}.mib".encode() for i in range(60) for j in range(10)}

    def write() -> None:
        for i in range(60):
            (tmp_path / str(i) / "a" / "b").mkdir(parents=True)
            for j in range(10):
                (tmp_path / str(i) / "a" / "b" / f"{j}.mib").write_bytes(b"1")

    writer = threading.Thread(target=write)
    writer.start()
    found = collect(scanner, hints, lambda found: found >= wanted)
    writer.join()
    assert found == wanted


def test_a_root_that_is_deleted_and_made_again_is_watched_again(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    hints = InotifyHints(share)
    hints.arm()
    hints.wait(0)
    share.rmdir()
    assert hints.wait(1) is RESCAN
    assert not hints.live
    assert hints.wait(0.01) == frozenset()
    share.mkdir()
    assert hints.wait(5) is RESCAN
    assert hints.live
    (share / "x.mib").write_bytes(b"1")
    assert hints.wait(1) == {b""}
    hints.close()


def test_a_root_that_is_not_there_yet_is_watched_when_it_comes(tmp_path: Path) -> None:
    hints = InotifyHints(tmp_path / "share")
    hints.arm()
    assert hints.wait(0) is RESCAN
    assert not hints.live
    (tmp_path / "share").mkdir()
    assert hints.wait(5) is RESCAN
    assert hints.live
    hints.close()


def test_a_root_replaced_by_another_folder_is_noticed(tmp_path: Path) -> None:
    share, other = tmp_path / "share", tmp_path / "other"
    share.mkdir()
    (other / "deep").mkdir(parents=True)
    hints = InotifyHints(share)
    hints.arm()
    hints.wait(0)
    share.rename(tmp_path / "away")
    other.rename(share)
    assert hints.wait(5) is RESCAN
    (share / "deep" / "x.mib").write_bytes(b"1")
    until(hints, b"deep")
    assert hints.live
    hints.close()


WATCHES = """
import pathlib, sys
from emflow.watch.hints import RESCAN
from emflow.watch.inotify import InotifyHints
hints = InotifyHints(sys.argv[1])
pathlib.Path("/proc/sys/user/max_inotify_watches").write_text("20")
hints.arm()
assert "raise fs.inotify.max_user_watches" in hints.degraded, hints.degraded
assert not hints.live
assert hints.wait(0) is RESCAN
assert hints.wait(0.01) == frozenset()
"""

INSTANCES = """
import pathlib, sys
from emflow.watch.hints import NoHints, choose
pathlib.Path("/proc/sys/user/max_inotify_instances").write_text("0")
hints = choose(sys.argv[1], "inotify")
assert isinstance(hints, NoHints)
assert "raise fs.inotify.max_user_instances" in hints.degraded, hints.degraded
"""


@pytest.mark.parametrize("code", [WATCHES, INSTANCES], ids=["watches", "instances"])
def test_exhausted_limits_end_in_scans_with_a_warning(tmp_path: Path, code: str) -> None:
    # a user namespace has limits of its own, so that nothing else on the machine notices
    own = ["unshare", "--user", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here (unshare --user --map-root-user)")
    for number in range(50):
        (tmp_path / str(number)).mkdir()
    done = subprocess.run(
        [*own, sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_descriptor_left_for_a_new_start_ends_in_scans(tmp_path: Path, hints: InotifyHints) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    held: list[int] = []
    try:
        hints._drop_inotify()  # frees one descriptor, which another thread takes before the new start
        while True:
            held.append(os.dup(2))
    except OSError:
        hints._start_anew()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert "limit of open files" in hints.degraded
    assert hints.wait(0) is RESCAN
