"""Copies that are killed, run out of room, or meet a disk that fails."""

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash

from emflow.blocks import BLOCK
from emflow.errors import EmflowError, NoSpace, NotAllowed, Unavailable
from emflow.transfer import publish_copy, stage

ID = "0123456789abcdef"
DATA = os.urandom(8 * BLOCK + 5)

STAGE = """
import sys
from emflow.transfer import stage
print(stage([(sys.argv[1], b"scan.mib", ".mib")], sys.argv[2], "0123456789abcdef").digest)
"""

STAGE_AND_PAUSE = """
import sys
from emflow.transfer import stage

def progress(done, total):
    if done >= int(sys.argv[3]):
        print("paused", flush=True)
        sys.stdin.read()

stage([(sys.argv[1], b"scan.mib", ".mib")], sys.argv[2], "0123456789abcdef", progress=progress)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "scan.mib"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "emflow-test", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def traced(log: Path, source: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Stage in a process of its own under strace."""
    command = ["strace", "-f", "-y", "-o", str(log), *options, sys.executable, "-c", STAGE, str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# --- killed ---


def test_a_killed_copy_goes_on_and_has_the_same_digest(source: Path, target: Path) -> None:
    command = [sys.executable, "-c", STAGE_AND_PAUSE, str(source), str(target), str(5 * BLOCK)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"paused\n"
    child.kill()
    assert child.wait() == -9
    child.stdin.close()
    child.stdout.close()
    told: list[int] = []
    transfer = stage([(source, b"scan.mib", ".mib")], target, ID, progress=lambda done, _: told.append(done))
    assert told[0] == 5 * BLOCK
    assert len(told) == 1 + 4  # the blocks that were missing, and no other
    assert transfer.members[0].xxh3_128 == xxhash.xxh3_128_hexdigest(DATA)
    assert (target / f"{ID}.mib").read_bytes() == DATA
    assert names(target) == [f"{ID}.mib"]


# --- the order of system calls ---


@pytest.mark.needs_strace
def test_data_are_synced_before_the_rename_and_the_folder_after_it(tmp_path: Path, source: Path, target: Path) -> None:
    log = tmp_path / "log"
    calls = "trace=pwrite64,fsync,rename,renameat,renameat2"
    assert traced(log, source, target, "-e", calls).returncode == 0
    lines = log.read_text().splitlines()
    temporary = re.compile(rf"<{re.escape(str(target))}/\.{ID}\.mib\.[^>]*\.part>")
    written = [n for n, line in enumerate(lines) if "pwrite64(" in line and temporary.search(line)]
    synced = [n for n, line in enumerate(lines) if "fsync(" in line and temporary.search(line)]
    renamed = [n for n, line in enumerate(lines) if "rename" in line and f'{ID}.mib"' in line]
    folder = [n for n, line in enumerate(lines) if "fsync(" in line and f"<{target}>" in line]
    assert len(written) == 9
    assert len(synced) == len(renamed) == len(folder) == 1
    assert written[-1] < synced[0] < renamed[0] < folder[0]


@pytest.mark.needs_strace
@pytest.mark.parametrize(("when", "succeeds"), [("2..3", True), ("2+", False)])
def test_a_read_that_fails_is_tried_three_times(
    tmp_path: Path, source: Path, target: Path, when: str, succeeds: bool
) -> None:
    log = tmp_path / "log"
    inject = f"inject=preadv,preadv2:error=EIO:when={when}"
    done = traced(log, source, target, "-e", "trace=preadv,preadv2", "-e", inject)
    assert log.read_text().count("(INJECTED)") == (2 if succeeds else 3)
    if succeeds:
        assert (target / f"{ID}.mib").read_bytes() == DATA
    else:
        assert f"Input/output error at offset {BLOCK}, three times" in done.stderr
        assert not (target / f"{ID}.mib").exists()


@pytest.mark.needs_strace
def test_a_sync_that_fails_is_never_tried_again_on_the_same_file(tmp_path: Path, source: Path, target: Path) -> None:
    log = tmp_path / "log"
    options = ["-e", "trace=fsync,pwrite64", "-e", "inject=fsync:error=EIO:when=1"]
    assert traced(log, source, target, *options).returncode == 0
    text = log.read_text()
    assert text.count("(INJECTED)") == 1
    synced = re.findall(r"fsync\(\d+<[^>]*\.(\d)\.part>", text)
    assert synced == ["0", "1"]
    assert len(re.findall(r"pwrite64\(\d+<[^>]*\.1\.part>", text)) == 9  # all of it came from the source again
    assert (target / f"{ID}.mib").read_bytes() == DATA
    assert names(target) == [f"{ID}.mib"]


@pytest.mark.needs_strace
def test_a_disk_that_never_syncs_is_named(tmp_path: Path, source: Path, target: Path) -> None:
    done = traced(tmp_path / "log", source, target, "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1+")
    assert "fsync failed with EIO twice" in done.stderr
    assert names(target) == []


@pytest.mark.needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_during_the_copy_is_told_as_such(tmp_path: Path, source: Path, target: Path, error: str) -> None:
    log = tmp_path / "log"
    done = traced(log, source, target, "-e", "trace=pwrite64", "-e", f"inject=pwrite64:error={error}:when=4")
    assert log.read_text().count("(INJECTED)") == 1
    assert "NoSpace" in done.stderr
    assert names(target) == []


@pytest.mark.needs_strace
def test_short_writes_are_continued(tmp_path: Path, source: Path, target: Path) -> None:
    # the kernel says that it took 1000 bytes, and takes none: what follows must be sent again from there
    log = tmp_path / "log"
    traced(log, source, target, "-e", "trace=pwrite64", "-e", "inject=pwrite64:retval=1000:when=2")
    offsets = [int(o) for o in re.findall(r"pwrite64\(.*, (\d+)\) +=", log.read_text())]
    assert offsets[:4] == [0, BLOCK, BLOCK + 1000, 2 * BLOCK]


# --- a full disk ---


@pytest.mark.needs_root
def test_a_disk_that_fills_up_meanwhile_gets_its_room_back(source: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"

    def fill(done: int, total: int) -> None:
        if not ballast.exists():
            with ballast.open("wb") as file:
                file.truncate(0)
                os.posix_fallocate(file.fileno(), 0, 3840 << 10)

    with pytest.raises(NoSpace, match="No space left"):
        stage([(source, b"scan.mib", ".mib")], small_disk / "source", ID, progress=fill)
    assert names(small_disk / "source") == []
    with pytest.raises(NoSpace, match="bytes to copy"):
        stage([(source, b"scan.mib", ".mib")], small_disk / "source", ID)
    ballast.unlink()
    stage([(source, b"scan.mib", ".mib")], small_disk / "source", ID)
    assert (small_disk / "source" / f"{ID}.mib").read_bytes() == DATA


@pytest.mark.needs_root
def test_a_result_that_does_not_fit_leaves_the_old_one_whole(source: Path, small_disk: Path) -> None:
    old = small_disk / "x_emflow.h5"
    old.write_bytes(b"old")
    with (small_disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 3840 << 10)
    with pytest.raises(NoSpace):
        publish_copy(source, old)
    assert old.read_bytes() == b"old"
    assert names(small_disk) == ["ballast", "x_emflow.h5"]


# --- the operating system says no ---


@contextmanager
def nobody() -> Iterator[None]:
    """Act as an account without rights, since root may read everything."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.needs_root
def test_no_permission_is_told_with_the_account() -> None:
    with tempfile.TemporaryDirectory(prefix="emflow-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "secret.mib").write_bytes(b"1")
        (folder / "secret.mib").chmod(0o600)
        (folder / "open.mib").write_bytes(b"1")
        with nobody():
            with pytest.raises(NotAllowed, match=r"secret.mib can't be read: Permission denied.*uid 65534"):
                stage([(folder / "secret.mib", b"secret.mib", ".mib")], folder, ID)
            with pytest.raises(NotAllowed, match="can't be written: Permission denied"):
                stage([(folder / "open.mib", b"open.mib", ".mib")], folder, ID)
            with pytest.raises(NotAllowed, match="can't be written: Permission denied"):
                stage([(folder / "open.mib", b"open.mib", ".mib")], folder / "new", ID)
            with pytest.raises(NotAllowed, match="can't be written: Permission denied"):
                publish_copy(folder / "open.mib", folder / "out.h5")


def test_no_descriptors_left_is_a_passing_state(source: Path, target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    target.mkdir()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(Unavailable, match="Too many open files"):
            stage([(source, b"scan.mib", ".mib")], target, ID)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert stage([(source, b"scan.mib", ".mib")], target, ID).bytes == len(DATA)


def test_a_target_that_is_a_file_is_an_error_of_ours(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EmflowError):
        stage([(source, b"scan.mib", ".mib")], tmp_path / "file" / "source", ID)
