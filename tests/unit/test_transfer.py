import os
import threading
from pathlib import Path

import pytest
import xxhash

from emflow.blocks import BLOCK
from emflow.errors import EmflowError, NoSpace, NotAllowed, SourceChanged
from emflow.transfer import Stopped, digest_of, free_bytes, joint_digest, publish_copy, stage

ID = "0123456789abcdef"
DATA = os.urandom(3 * BLOCK + 17)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    folder = tmp_path / "share" / "day"
    folder.mkdir(parents=True)
    (folder / "scan.mib").write_bytes(DATA)
    (folder / "scan.hdr").write_bytes(b"HDR,\n")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "source"


def members(share: Path) -> list[tuple[str, bytes, str]]:
    return [(str(share / "scan.mib"), b"day/scan.mib", ".mib"), (str(share / "scan.hdr"), b"day/scan.hdr", ".hdr")]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def left_over(target: Path) -> list[str]:
    return [n for n in names(target) if n.startswith(".")]


def test_every_file_is_copied_and_digested(share: Path, target: Path) -> None:
    told: list[tuple[int, int]] = []
    transfer = stage(members(share), target, ID, progress=lambda done, total: told.append((done, total)))
    assert (target / f"{ID}.mib").read_bytes() == DATA
    assert (target / f"{ID}.hdr").read_bytes() == b"HDR,\n"
    assert names(target) == [f"{ID}.hdr", f"{ID}.mib"]
    assert transfer.path == str(target / f"{ID}.mib")
    assert transfer.bytes == len(DATA) + 5 == told[-1][0] == told[-1][1]
    first, second = transfer.members
    assert first.xxh3_128 == xxhash.xxh3_128_hexdigest(DATA)
    assert (second.relpath, second.suffix, second.fingerprint.size) == (b"day/scan.hdr", ".hdr", 5)
    both = f"{xxhash.xxh3_128_hexdigest(DATA)}\n{xxhash.xxh3_128_hexdigest(b'HDR,' + bytes([10]))}"
    assert transfer.digest == xxhash.xxh3_128_hexdigest(both.encode())


def test_reading_in_place_gives_the_same_digest(share: Path, target: Path) -> None:
    there = digest_of(members(share))
    copied = stage(members(share), target, ID)
    assert (there.digest, there.members, there.bytes) == (copied.digest, copied.members, copied.bytes)
    assert there.path == str(share / "scan.mib")


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_every_size_is_whole(tmp_path: Path, target: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(DATA[:size])
    transfer = stage([(tmp_path / "x", b"x", ".npy")], target, ID)
    assert (target / f"{ID}.npy").read_bytes() == DATA[:size]
    assert transfer.members[0].xxh3_128 == xxhash.xxh3_128_hexdigest(DATA[:size])


def test_hostile_names_stay_behind(tmp_path: Path, target: Path) -> None:
    name = b"\xff\n'$(reboot)\" -rf.mib"
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(b"1")
    assert stage([(path, name, ".mib")], target, ID).members[0].relpath == name
    assert names(target) == [f"{ID}.mib"]


def test_a_stopped_copy_goes_on_where_it_was(share: Path, target: Path) -> None:
    stop = threading.Event()
    with pytest.raises(Stopped):
        stage(members(share), target, ID, stop=stop, progress=lambda done, _: stop.set() if done > BLOCK else None)
    assert len(left_over(target)) == 1
    told: list[int] = []
    transfer = stage(members(share), target, ID, progress=lambda done, _: told.append(done))
    assert told[0] == 2 * BLOCK  # what the first attempt left
    assert transfer.members[0].xxh3_128 == xxhash.xxh3_128_hexdigest(DATA)
    assert (target / f"{ID}.mib").read_bytes() == DATA
    assert left_over(target) == []


def test_a_temporary_of_another_boot_or_source_is_not_continued(share: Path, target: Path) -> None:
    stop = threading.Event()
    with pytest.raises(Stopped):
        stage(members(share), target, ID, stop=stop, progress=lambda done, _: stop.set() if done else None)
    (begun,) = left_over(target)
    boot = begun.replace("-", ".").split(".")[-3]
    other = target / begun.replace(boot, "0" * 32)
    other.write_bytes(b"\0" * (2 * BLOCK))
    (target / begun).unlink()
    told: list[int] = []
    stage(members(share), target, ID, progress=lambda done, _: told.append(done))
    assert told[0] == 0
    assert (target / f"{ID}.mib").read_bytes() == DATA
    assert left_over(target) == []


def test_a_copy_of_an_older_content_of_equal_size_and_time_is_made_anew(share: Path, target: Path) -> None:
    source = share / "scan.mib"
    stage(members(share), target, ID)
    times = (source.stat().st_atime_ns, source.stat().st_mtime_ns)
    source.write_bytes(DATA[::-1])
    os.utime(source, ns=times)  # some writers set a file's time to the day of the experiment
    transfer = stage(members(share), target, ID)
    assert (target / f"{ID}.mib").read_bytes() == DATA[::-1]
    assert transfer.members[0].xxh3_128 == xxhash.xxh3_128_hexdigest(DATA[::-1])


def once(action: object) -> object:
    """Call an action at the first progress only."""
    todo = [action]

    def progress(done: int, total: int) -> None:
        if todo and done:
            todo.pop()()  # type: ignore[operator]

    return progress


@pytest.mark.parametrize("how", ["grow", "cut", "touch", "replace", "remove", "sidecar"])
def test_a_source_that_changes_meanwhile_is_refused(share: Path, target: Path, how: str) -> None:
    path = share / "scan.mib"

    def change() -> None:
        if how == "grow":
            with path.open("ab") as file:
                file.write(b"more")
        elif how == "cut":
            os.truncate(path, BLOCK)
        elif how == "touch":
            os.utime(path, (1, 1))
        elif how == "replace":
            (share / "new").write_bytes(DATA)
            (share / "new").replace(path)
        elif how == "remove":
            path.unlink()
        else:
            (share / "scan.hdr").write_bytes(b"HDR!!")

    with pytest.raises(SourceChanged):
        stage(members(share), target, ID, progress=once(change))  # type: ignore[arg-type]
    assert left_over(target) == []


def test_a_first_file_that_changes_while_the_second_is_copied_is_refused(share: Path, target: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done == total:
            os.utime(share / "scan.mib", (1, 1))

    with pytest.raises(SourceChanged, match="its times"):
        stage(members(share), target, ID, progress=progress)
    with pytest.raises(SourceChanged):
        digest_of(members(share), progress=lambda done, total: os.utime(share / "scan.mib", (done, 1)))


def test_links_folders_pipes_and_missing_files_are_refused(share: Path, target: Path) -> None:
    (share / "link.mib").symlink_to("scan.mib")
    (share / "folder").symlink_to(".")
    os.mkfifo(share / "pipe.mib")
    cases = {
        "link.mib": (NotAllowed, "symbolic link"),
        "pipe.mib": (NotAllowed, "is not a file"),
        ".": (EmflowError, "is not a file|directory"),
        "gone.mib": (SourceChanged, "is gone"),
    }
    for name, (kind, text) in cases.items():
        with pytest.raises(kind, match=text):
            stage([(share / name, b"day/" + name.encode(), ".mib")], target, ID)


def test_a_folder_that_became_a_link_leads_nowhere(tmp_path: Path, target: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.mib").write_bytes(b"secret")
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "day").symlink_to(tmp_path / "secret")
    with pytest.raises(EmflowError):
        stage([(tmp_path / "share" / "day" / "x.mib", b"day/x.mib", ".mib")], target, ID)
    assert left_over(target) == []
    assert not (target / f"{ID}.mib").exists()


def test_what_does_not_fit_is_not_begun(tmp_path: Path, target: Path) -> None:
    with (tmp_path / "huge.mib").open("wb") as file:
        file.truncate(free_bytes(tmp_path) + (1 << 40))
    with pytest.raises(NoSpace, match="free"):
        stage([(tmp_path / "huge.mib", b"huge.mib", ".mib")], target, ID)
    assert names(target) == []


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    facts = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "not" / "yet") <= facts.f_blocks * facts.f_frsize
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_the_joint_digest_depends_on_order() -> None:
    assert joint_digest(["a", "b"]) != joint_digest(["b", "a"])
    assert len(joint_digest([])) == 32


def test_publishing_replaces_a_file_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "result.h5").write_bytes(DATA)
    (tmp_path / "results").mkdir()
    target = tmp_path / "results" / ("n" * 251 + ".h5")
    target.write_bytes(b"older and to be replaced")
    assert publish_copy(tmp_path / "result.h5", target) == xxhash.xxh3_128_hexdigest(DATA)
    assert target.read_bytes() == DATA
    assert names(tmp_path / "results") == [target.name]


def test_a_stale_temporary_of_a_result_does_not_get_into_it(tmp_path: Path) -> None:
    (tmp_path / "result.h5").write_bytes(b"short")
    with pytest.raises(EmflowError):
        publish_copy(tmp_path / "gone", tmp_path / "out.h5")
    publish_copy(tmp_path / "result.h5", tmp_path / "out.h5")
    publish_copy(tmp_path / "result.h5", tmp_path / "out.h5")
    assert (tmp_path / "out.h5").read_bytes() == b"short"
    assert names(tmp_path) == ["out.h5", "result.h5"]
