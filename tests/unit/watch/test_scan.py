import os
from pathlib import Path

import pytest

from emflow.errors import Unavailable
from emflow.records import Fingerprint
from emflow.watch.hints import RESCAN
from emflow.watch.scan import Scanner, Sighting, walk
from emflow.watch.walk import look

HOSTILE = [
    b"new\nline.mib",
    b"$(reboot).mib",
    b"'quote\".mib",
    b"-rf.mib",
    b"\xff\xfe.mib",
    b" .mib",
    b"x" * 251 + b".mib",
]


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def seen(sightings: list[Sighting]) -> list[bytes]:
    return [s.relpath for s in sightings]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scanner(tmp_path: Path, clock: Clock) -> Scanner:
    return Scanner(tmp_path, match=["*.mib"], active_s=0.5, recent_s=3, whole_s=15, clock=clock)


# --- walk ---


def test_every_matching_file_is_seen_with_its_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "b" / "x.mib", b"12345")
    write(tmp_path / "a" / "x.txt")
    write(tmp_path / ".hidden" / "x.mib")
    facts = path.stat()
    assert list(walk(tmp_path, match=["*.mib"])) == [
        Sighting(b"a/b/x.mib", Fingerprint(size=5, mtime_ns=facts.st_mtime_ns, ctime_ns=facts.st_ctime_ns))
    ]


def test_one_folder_is_walked_alone(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.mib")
    write(tmp_path / "a" / "deep" / "y.mib")
    write(tmp_path / "z.mib")
    assert seen(list(walk(tmp_path, b"a", recursive=False, match=["*.mib"]))) == [b"a/x.mib"]
    assert sorted(seen(list(walk(tmp_path, b"a", match=["*.mib"])))) == [b"a/deep/y.mib", b"a/x.mib"]


def test_hostile_names_pass_unchanged(tmp_path: Path) -> None:
    for name in HOSTILE:
        (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    assert sorted(seen(list(walk(tmp_path, match=["*.mib"])))) == sorted(HOSTILE)


def test_a_master_stands_for_its_data_files_and_its_sidecar(tmp_path: Path) -> None:
    for name in ("a_master.h5", "a.h5", "a_data_000001.h5", "a_data_000002.h5", "b.h5"):
        write(tmp_path / name)
    assert sorted(seen(list(walk(tmp_path, match=["*.h5"])))) == [b"a_master.h5", b"b.h5"]
    root = os.fsencode(tmp_path)
    assert look(root, b"a.h5") is None
    assert look(root, b"b.h5") is not None


def test_a_files_age_never_hides_it(tmp_path: Path) -> None:
    for name, year_s in (("old.mib", 0), ("future.mib", 4_000_000_000)):
        os.utime(write(tmp_path / name), (year_s, year_s))
    assert sorted(seen(list(walk(tmp_path)))) == [b"future.mib", b"old.mib"]


def test_links_are_named_and_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "outside" / "x.mib")
    share = tmp_path / "share"
    share.mkdir()
    (share / "file.mib").symlink_to(tmp_path / "outside" / "x.mib")
    (share / "broken.mib").symlink_to("nowhere")
    (share / "folder").symlink_to(tmp_path / "outside")
    found = {s.relpath: s.problem for s in walk(share, match=["*.mib"])}
    assert sorted(found) == [b"broken.mib", b"file.mib"]
    assert all("is a symbolic link" in p for p in found.values())


def test_what_only_looks_like_a_file_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path / "run.mib" / "inside.mib")
    os.mkfifo(tmp_path / "pipe.mib")
    found = {s.relpath: s.problem for s in walk(tmp_path, match=["*.mib"])}
    assert found[b"run.mib"].startswith("is a folder")
    assert "neither a file" in found[b"pipe.mib"]
    assert found[b"run.mib/inside.mib"] == ""


# --- what is new ---


def test_only_what_is_new_or_changed_is_told(tmp_path: Path, scanner: Scanner) -> None:
    path = write(tmp_path / "x.mib")
    assert seen(scanner.scan()) == [b"x.mib"]
    scanner.mark_all()
    assert scanner.scan() == []
    path.write_bytes(b"longer")
    scanner.mark_all()
    assert seen(scanner.scan()) == [b"x.mib"]


def test_a_change_of_times_alone_is_a_change(tmp_path: Path, scanner: Scanner) -> None:
    path = write(tmp_path / "x.mib")
    scanner.scan()
    os.utime(path, (1, 1))
    scanner.mark_all()
    assert scanner.scan()[0].fingerprint.mtime_ns == 1_000_000_000


def test_what_the_journal_knows_is_not_new(tmp_path: Path, scanner: Scanner) -> None:
    write(tmp_path / "a.mib")
    write(tmp_path / "b.mib")
    known = {s.relpath: s.fingerprint for s in walk(tmp_path)}
    scanner.load([(b"a.mib", known[b"a.mib"])])
    assert seen(scanner.scan()) == [b"b.mib"]


def test_a_forgotten_file_is_told_again(tmp_path: Path, scanner: Scanner, clock: Clock) -> None:
    write(tmp_path / "d" / "x.mib")
    scanner.scan()
    scanner.forget(b"d/x.mib")
    clock.now += 1
    assert seen(scanner.scan()) == [b"d/x.mib"]


def test_a_file_that_vanishes_and_returns_unchanged_is_not_new(tmp_path: Path, scanner: Scanner) -> None:
    path = write(tmp_path / "x.mib")
    write(tmp_path / "y.mib")
    scanner.scan()
    path.rename(tmp_path / ".x")
    scanner.mark_all()
    assert scanner.scan() == []
    # a rename changes ctime: the file is seen as changed, never as deleted
    (tmp_path / ".x").rename(path)
    scanner.mark_all()
    assert seen(scanner.scan()) == [b"x.mib"]


# --- paces ---


def test_a_new_file_is_found_within_the_pace_of_its_folder(tmp_path: Path, scanner: Scanner, clock: Clock) -> None:
    write(tmp_path / "day" / "a.mib")
    write(tmp_path / "idle" / "b.mib")
    scanner.scan()
    scanner._recent.pop(b"idle")  # an hour has passed there
    scanner.activate(b"day/a.mib")
    write(tmp_path / "day" / "new.mib")
    write(tmp_path / "idle" / "new.mib")
    write(tmp_path / "fresh" / "deep" / "new.mib")
    assert scanner.next_due() == pytest.approx(clock.now + 0.5)
    clock.now += 0.5
    assert seen(scanner.scan()) == [b"day/new.mib"]
    clock.now += 2.5
    assert seen(scanner.scan()) == [b"fresh/deep/new.mib"]
    clock.now += 12
    assert seen(scanner.scan()) == [b"idle/new.mib"]


def test_an_empty_folder_that_was_there_before_is_read_at_the_recent_pace(
    tmp_path: Path, scanner: Scanner, clock: Clock
) -> None:
    (tmp_path / "today").mkdir()
    scanner.scan()
    write(tmp_path / "today" / "a.mib")
    clock.now += 3
    assert seen(scanner.scan()) == [b"today/a.mib"]


def test_live_hints_stretch_the_whole_scan(tmp_path: Path, scanner: Scanner, clock: Clock) -> None:
    write(tmp_path / "idle" / "b.mib")
    scanner.live_hints = True
    scanner.scan()
    scanner._recent.clear()
    write(tmp_path / "idle" / "new.mib")
    clock.now += 59.9
    assert scanner.scan() == []
    clock.now += 0.2
    assert seen(scanner.scan()) == [b"idle/new.mib"]


def test_rest_ends_the_quick_pace(tmp_path: Path, scanner: Scanner, clock: Clock) -> None:
    write(tmp_path / "day" / "a.mib")
    scanner.scan()
    scanner.activate(b"day/a.mib")
    scanner.rest(b"day/a.mib")
    scanner.rest(b"day/a.mib")
    assert scanner.next_due() == pytest.approx(clock.now + 3)


def test_a_slow_scan_rests_ten_times_as_long(tmp_path: Path) -> None:
    now = iter(range(10_000))
    write(tmp_path / "x.mib")
    scanner = Scanner(tmp_path, active_s=0.5, recent_s=3, whole_s=15, clock=lambda: float(next(now)))
    scanner.activate(b"x.mib")
    scanner.scan()  # each look at this clock takes a second
    scanner.mark(RESCAN)
    scanner.mark({b""})
    due = scanner.next_due()
    assert due - float(next(now)) >= 5


def test_a_hint_makes_a_scan_due_at_once(tmp_path: Path, scanner: Scanner, clock: Clock) -> None:
    write(tmp_path / "idle" / "a.mib")
    scanner.scan()
    write(tmp_path / "idle" / "b.mib")
    scanner.mark({b"idle"})
    assert scanner.next_due() <= clock.now
    assert seen(scanner.scan()) == [b"idle/b.mib"]
    assert scanner.next_due() > clock.now
    write(tmp_path / "deep" / "er" / "c.mib")
    scanner.mark(RESCAN)
    assert scanner.next_due() <= clock.now
    assert seen(scanner.scan()) == [b"deep/er/c.mib"]


def test_a_named_file_costs_no_listing(tmp_path: Path, scanner: Scanner, clock: Clock) -> None:
    write(tmp_path / "d" / "a.mib")
    scanner.scan()
    write(tmp_path / "d" / "b.mib")
    write(tmp_path / "d" / "c.mib")
    scanner.mark((), [b"d/b.mib", b"d/gone.mib", b"d/other.txt"])
    assert scanner.next_due() < clock.now
    assert seen(scanner.scan()) == [b"d/b.mib"]
    assert scanner.next_due() > clock.now


def test_a_hint_of_a_folder_that_is_gone_does_not_spin(tmp_path: Path, scanner: Scanner, clock: Clock) -> None:
    scanner.scan()
    scanner.mark({b"never/was"})
    scanner.activate(b"gone/x.mib")
    assert scanner.scan() == []
    assert scanner.next_due() > clock.now


def test_a_folder_that_comes_back_is_entered_again(tmp_path: Path, scanner: Scanner, clock: Clock) -> None:
    first = write(tmp_path / "d" / "a.mib")
    scanner.scan()
    first.unlink()
    first.parent.rmdir()
    scanner.mark({b"d"})
    scanner.scan()
    scanner._recent.clear()
    write(tmp_path / "d" / "b.mib")
    clock.now += 3
    assert seen(scanner.scan()) == [b"d/b.mib"]


# --- an empty mount is an alarm ---


def test_a_missing_root_is_an_alarm_and_comes_back_by_itself(tmp_path: Path, clock: Clock) -> None:
    root = tmp_path / "share"
    write(root / "a.mib")
    scanner = Scanner(root, clock=clock)
    scanner.scan()
    root.rename(tmp_path / "away")
    clock.now += 20
    with pytest.raises(Unavailable, match="looks unmounted"):
        scanner.scan()
    assert scanner.next_due() > clock.now
    write(tmp_path / "away" / "b.mib")
    (tmp_path / "away").rename(root)
    clock.now += 20
    assert seen(scanner.scan()) == [b"b.mib"]


def test_an_empty_root_is_an_alarm_only_where_files_were_known(tmp_path: Path, clock: Clock) -> None:
    assert Scanner(tmp_path, clock=clock).scan() == []
    scanner = Scanner(tmp_path, clock=clock)
    scanner.load([(b"a.mib", Fingerprint(size=1, mtime_ns=1, ctime_ns=1))])
    with pytest.raises(Unavailable, match="it is empty, and 1 files were known"):
        scanner.scan()


def test_a_root_that_is_a_file_is_an_alarm(tmp_path: Path) -> None:
    root = write(tmp_path / "share")
    with pytest.raises(Unavailable, match="looks unmounted: not a directory"):
        Scanner(root).scan()


def test_ten_thousand_files_are_compared_within_a_second(tmp_path: Path) -> None:
    for number in range(10_000):
        if number % 100 == 0:
            (tmp_path / str(number)).mkdir()
        (tmp_path / str(number // 100 * 100) / f"{number}.mib").touch()
    scanner = Scanner(tmp_path, match=["*.mib"])
    assert len(scanner.scan()) == 10_000
    scanner.mark_all()
    assert scanner.scan() == []
    assert scanner._whole_at_best - scanner._last[b""][0] < 10  # ten times its own duration
