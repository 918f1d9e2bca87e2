"""The journal's promises: moves by the table, with their event, once, for good, at a cost that does not grow."""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from emflow.errors import Busy, JournalError, NoSpace, NotAllowed, StaleState, Unavailable, UsageError
from emflow.journal import Journal
from emflow.journal_rows import values_of
from emflow.journal_schema import STEPS, Step, migrate, open_database
from emflow.records import (
    ACQUISITION_MOVES,
    ACTIVE_JOB_STATES,
    JOB_MOVES,
    Acquisition,
    AcquisitionState,
    Fingerprint,
    Job,
    JobState,
    acquisition_id,
    job_name,
)
from mpi_kernels.contract import Event

A, J = AcquisitionState, JobState
PRINT = Fingerprint(size=10, mtime_ns=1_700_000_000_000_000_001, ctime_ns=2)
DIGEST = "0123456789abcdef" * 2


def acquisition(relpath=b"a.h5", state=A.GROWING, generation=0, share="scope", **more):
    key = acquisition_id(share, relpath, generation)
    facts = {
        "day": "2024-05-06",
        "trace": key,
        "seen_ns": 5,
        "changed_ns": 6,
        "fingerprint": PRINT,
        "digest": DIGEST if state in (A.STAGED, A.DONE) else None,
    }
    return Acquisition(id=key, share=share, relpath=relpath, generation=generation, state=state, **(facts | more))


def job(key, attempt=1, state=J.PLANNED, **more):
    name = job_name(key, attempt)
    return Job(name=name, acquisition=key, attempt=attempt, state=state, recipe="default", scheduler="local", **more)


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.sqlite") as made:
        yield made


# --- facts in, facts out


def test_a_record_comes_back_as_it_went_in(journal):
    given = acquisition(
        b"d/\xff\n'$().h5",
        fingerprint=Fingerprint(size=2**40, mtime_ns=2**70, ctime_ns=-(2**70)),
        format="hdf5",
        kind="4d",
        frames=7,
        reason="why",
        supersedes="0" * 16,
    )
    assert journal.add_acquisition(given, attrs={"path": "bad \udcff"})
    assert journal.acquisition(given.id) == given
    [(number, event)] = journal.events()
    assert number == 1
    assert (event.name, event.subject, event.trace, event.pid) == ("noticed", given.id, given.trace, os.getpid())
    assert event.attrs == {"path": "bad \udcff"}


def test_an_id_or_name_is_added_once_and_told_once(journal):
    one = acquisition()
    assert journal.add_acquisition(one)
    assert not journal.add_acquisition(one)
    assert journal.add_job(job(one.id))
    assert not journal.add_job(job(one.id))
    assert [e.name for _, e in journal.events()] == ["noticed", "planned"]


def test_a_job_needs_its_acquisition_and_leaves_no_event_without_it(journal):
    with pytest.raises(ValueError, match="FOREIGN KEY"):
        journal.add_job(job("0" * 16))
    assert journal.events() == []


def test_unknown_ids_are_usage_errors_with_the_name_made_printable(journal):
    with pytest.raises(UsageError, match=r"a\\n"):
        journal.acquisition("a\n")
    with pytest.raises(UsageError, match=r"\\udcff"):
        journal.job("\udcff")


# --- moves

ACQUISITION_PAIRS = list(itertools.product(A, A))
JOB_PAIRS = list(itertools.product(J, J))


@pytest.mark.parametrize(("start", "end"), ACQUISITION_PAIRS)
def test_acquisitions_move_by_the_table_only(journal, start, end):
    one = acquisition(state=start, digest=DIGEST)
    journal.add_acquisition(one)
    if end in ACQUISITION_MOVES[start]:
        moved = journal.move_acquisition(one.id, start, end, reason="because", attrs={"more": 1})
        assert (moved.state, moved.reason) == (end, "because")
        assert moved.changed_ns > one.changed_ns
        event = journal.events()[-1][1]
        assert (event.name, event.attrs) == (end.lower(), {"from": start, "reason": "because", "more": 1})
    else:
        with pytest.raises(ValueError, match="not allowed"):
            journal.move_acquisition(one.id, start, end)
        assert journal.acquisition(one.id) == one
        assert len(journal.events()) == 1


@pytest.mark.parametrize(("start", "end"), JOB_PAIRS)
def test_jobs_move_by_the_table_only(journal, start, end):
    one = acquisition(state=A.STAGED)
    journal.add_acquisition(one)
    journal.add_job(job(one.id, state=start))
    name = job_name(one.id, 1)
    if end in JOB_MOVES[start]:
        moved = journal.move_job(name, start, end, scheduler_id="17")
        assert (moved.state, moved.scheduler_id) == (end, "17")
        event = journal.events()[-1][1]
        assert (event.name, event.subject, event.trace) == (end.lower(), name, one.trace)
    else:
        with pytest.raises(ValueError, match="not allowed"):
            journal.move_job(name, start, end)
        assert journal.job(name).state is start


def test_every_start_must_allow_the_end(journal):
    journal.add_acquisition(acquisition(state=A.READY))
    key = acquisition().id
    with pytest.raises(ValueError, match="DONE → READY"):
        journal.move_acquisition(key, {A.GROWING, A.DONE}, A.READY)
    assert journal.move_acquisition(key, {A.GROWING, A.READY}, A.QUARANTINED).state is A.QUARANTINED


def test_a_move_from_another_state_changes_nothing(journal):
    one = acquisition()
    journal.add_acquisition(one)
    with pytest.raises(StaleState, match="GROWING, not READY"):
        journal.move_acquisition(one.id, A.READY, A.STAGED, digest=DIGEST)
    with pytest.raises(StaleState):
        journal.update_acquisition(one.id, A.READY, reason="no")
    assert journal.acquisition(one.id) == one
    assert len(journal.events()) == 1


def test_only_known_columns_change(journal):
    one = acquisition()
    journal.add_acquisition(one)
    with pytest.raises(ValueError, match="'share' can't be changed"):
        journal.move_acquisition(one.id, A.GROWING, A.READY, share="other")
    with pytest.raises(ValueError, match="'state = 1; --' can't be changed"):
        journal.update_acquisition(one.id, A.GROWING, **{"state = 1; --": 1})
    changed = journal.update_acquisition(one.id, A.GROWING, event="grew", attrs={"n": 1}, frames=3, reason="r")
    assert (changed.frames, changed.reason, changed.state) == (3, "r", A.GROWING)
    assert journal.events()[-1][1].name == "grew"


def test_a_staged_acquisition_has_a_digest(journal):
    journal.add_acquisition(acquisition(state=A.READY))
    with pytest.raises(ValueError, match="digest"):
        journal.move_acquisition(acquisition().id, A.READY, A.STAGED)
    assert journal.acquisition(acquisition().id).state is A.READY


# --- transactions


def test_a_move_without_its_event_is_no_move(tmp_path):
    """The event is refused (by a trigger of the test's own): then the state must be the old one too."""
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.add_acquisition(acquisition())
    with sqlite3.connect(path) as raw:
        raw.execute(
            "CREATE TRIGGER no BEFORE INSERT ON event WHEN new.name = 'ready' BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    raw.close()
    with Journal(path) as journal:
        for outer in (contextlib.nullcontext(), journal.transaction()):
            with pytest.raises(ValueError, match="no"), outer:
                journal.move_acquisition(acquisition().id, A.GROWING, A.READY)
            assert journal.acquisition(acquisition().id) == acquisition()
        # caught inside a larger transaction: that one goes on, without any half of the failed move
        with journal.transaction():
            with pytest.raises(ValueError, match="no"):
                journal.move_acquisition(acquisition().id, A.GROWING, A.READY, format="hdf5")
            journal.move_acquisition(acquisition().id, A.GROWING, A.STALLED)
        assert journal.acquisition(acquisition().id).format == ""
        assert [e.name for _, e in journal.events()] == ["noticed", "stalled"]


def _add_then_fail(journal):
    with journal.transaction():
        journal.add_acquisition(acquisition(b"c"))
        journal.move_acquisition(acquisition(b"c").id, A.READY, A.STAGED)


def test_many_moves_share_one_commit_or_none(tmp_path):
    with Journal(tmp_path / "j") as journal, Journal(tmp_path / "j", read_only=True) as other:
        with journal.transaction():
            journal.add_acquisition(acquisition(b"a"))
            with journal.transaction():
                journal.add_acquisition(acquisition(b"b"))
            assert other.acquisitions() == []
        assert len(other.acquisitions()) == 2
        with pytest.raises(StaleState):
            _add_then_fail(journal)
        assert len(journal.acquisitions()) == 2


def test_changes_here_and_elsewhere_are_told_apart(tmp_path):
    with Journal(tmp_path / "j") as mine, Journal(tmp_path / "j") as theirs:
        before = mine.changes
        mine.add_acquisition(acquisition(b"a"))
        assert mine.changes == before + 1
        assert not mine.changed_elsewhere()
        theirs.add_acquisition(acquisition(b"b"))
        assert mine.changed_elsewhere()
        assert not mine.changed_elsewhere()
        assert mine.changes == before + 1


RACER = """
import sys, time
from emflow.errors import StaleState
from emflow.journal import Journal
from emflow.records import AcquisitionState as A
won = []
with Journal(sys.argv[1]) as journal:
    keys = [a.id for a in journal.acquisitions()]
    print("ready", flush=True)
    sys.stdin.readline()
    for key in keys:
        try:
            journal.move_acquisition(key, A.GROWING, A.READY)
            won.append(key)
        except StaleState:
            pass
print(" ".join(won), flush=True)
"""


def test_two_processes_never_make_the_same_move(tmp_path):
    path = tmp_path / "journal.sqlite"
    count = 60
    with Journal(path) as journal, journal.transaction():
        for n in range(count):
            journal.add_acquisition(acquisition(b"%d" % n))
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [racer.communicate(timeout=50)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(won[0] + won[1]) == sorted(acquisition(b"%d" % n).id for n in range(count))
    with Journal(path) as journal:
        assert len([e for _, e in journal.events() if e.name == "ready"]) == count


KILLED = """
import sys, time
from emflow.journal import Journal
from emflow.records import AcquisitionState as A
journal = Journal(sys.argv[1])
first, second = journal.acquisitions()
journal.move_acquisition(first.id, A.GROWING, A.READY)
with journal.transaction():
    journal.move_acquisition(first.id, A.READY, A.GROWING)
    journal.move_acquisition(second.id, A.GROWING, A.READY)
    print("inside", flush=True)
    time.sleep(60)
"""


def test_kill_in_a_transaction_leaves_what_was_committed(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.add_acquisition(acquisition(b"1"))
        journal.add_acquisition(acquisition(b"2"))
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "inside\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    with Journal(path) as journal:
        assert [a.state for a in journal.acquisitions()] == [A.READY, A.GROWING]
        assert [e.name for _, e in journal.events()] == ["noticed", "noticed", "ready"]
        journal.move_acquisition(acquisition(b"2").id, A.GROWING, A.READY)  # its lock died with it


# --- queries


def test_latest_and_known_are_the_newest_generation(journal):
    for relpath, generation in ((b"a", 0), (b"a", 1), (b"b", 0), (b"\xff", 0)):
        journal.add_acquisition(acquisition(relpath, generation=generation))
    journal.add_acquisition(acquisition(b"a", generation=0, share="other"))
    assert journal.latest("scope", b"a").generation == 1
    assert journal.latest("scope", b"c") is None
    assert [(a.relpath, a.generation) for a in journal.known("scope")] == [(b"a", 1), (b"b", 0), (b"\xff", 0)]


def test_known_goes_over_page_borders_and_may_be_written_to_meanwhile(journal):
    names = sorted(b"%04d" % n for n in range(2001))
    with journal.transaction():
        for name in names:
            journal.add_acquisition(acquisition(name))
    seen = []
    for one in journal.known("scope"):
        seen.append(one.relpath)
        if len(seen) % 500 == 1:
            journal.move_acquisition(one.id, A.GROWING, A.READY)
    assert seen == names


def test_acquisitions_by_state_in_order_of_sight(journal):
    for n, state in enumerate((A.DONE, A.READY, A.STAGED, A.READY)):
        journal.add_acquisition(acquisition(b"%d" % n, state=state))

    def names(*arguments, **options):
        return [a.name for a in journal.acquisitions(*arguments, **options)]

    assert names() == ["0", "1", "2", "3"]
    assert names({A.READY, A.STAGED}) == ["1", "2", "3"]
    assert names({A.READY, A.DONE}, limit=2) == ["0", "1"]
    assert names({A.READY, A.DONE}, limit=2, newest_first=True) == ["3", "1"]
    assert names(set()) == []
    acquisitions, jobs = journal.counts()
    assert acquisitions == dict.fromkeys(A, 0) | {A.DONE: 1, A.READY: 2, A.STAGED: 1}
    assert jobs == dict.fromkeys(J, 0)


def test_jobs_by_acquisition_and_by_state(journal):
    key = acquisition().id
    journal.add_acquisition(acquisition(state=A.STAGED))
    journal.add_job(job(key, 2, J.RUNNING))
    journal.add_job(job(key, 1, J.FAILED))
    assert [j.attempt for j in journal.jobs(key)] == [1, 2]
    assert [j.attempt for j in journal.jobs_in(ACTIVE_JOB_STATES)] == [2]
    assert journal.counts()[1][J.FAILED] == 1


def test_find_what_a_person_means(journal):
    one, two = acquisition(b"d/scan \xff.h5"), acquisition(b"d/other.h5")
    for each in (one, two):
        journal.add_acquisition(each)
    assert journal.find(one.id) == [one]
    assert journal.find(one.id[:9]) == [one]
    assert journal.find(f"{two.id}-01") == [two]
    assert journal.find("d/other.h5") == [two]
    assert journal.find(os.fsdecode(b"scan \xff")) == [one]
    assert journal.find("h5") == [one, two]
    assert journal.find("%") == []
    assert journal.find("") == []


# --- events


def event(seq=1, **more):
    facts = {
        "trace": "t",
        "subject": "s",
        "plane": "data",
        "host": "n1",
        "pid": 7,
        "seq": seq,
        "name": "read",
        "wall_ns": 100 + seq,
        "mono_ns": 1,
        "attrs": {"x": [1, "\udc80"]},
    }
    return Event(**facts | more)


def test_merging_twice_is_merging_once(journal):
    events = [event(1), event(2), event(2, pid=8), event(2, wall_ns=5)]
    assert journal.merge(events) == 4
    assert journal.merge([*events, event(3)]) == 1
    assert [e for _, e in journal.events()] == [*events, event(3)]


def test_events_are_chosen_and_paged(journal):
    journal.merge([event(1, trace="a"), event(2, name="x"), event(3, subject="j", trace="a"), event(4)])
    assert [n for n, _ in journal.events(trace="a")] == [1, 3]
    assert [n for n, _ in journal.events(subject="j")] == [3]
    assert [n for n, _ in journal.events(names=("x", "y"))] == [2]
    assert [n for n, _ in journal.events(after=1, limit=2)] == [2, 3]
    assert [n for n, _ in journal.events(trace="a", after=1)] == [3]


def test_own_events_are_numbered_over_all_journals_of_a_process(tmp_path):
    with Journal(tmp_path / "1") as one, Journal(tmp_path / "2") as two:
        for journal in (one, two, one):
            journal.append(subject="s", trace="t", plane="control", name="n", attrs={"a": 1})
        first, third = (e for _, e in one.events())
        assert first.seq < two.events()[0][1].seq < third.seq
        assert (first.plane, first.attrs, first.pid) == ("control", {"a": 1}, os.getpid())
        assert abs(first.wall_ns - time.time_ns()) < 60e9


@pytest.mark.parametrize("sql", ["UPDATE event SET name = 'x'", "DELETE FROM event"])
def test_events_are_append_only(tmp_path, sql):
    with Journal(tmp_path / "j") as journal:
        journal.merge([event()])
    raw = sqlite3.connect(tmp_path / "j")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        raw.execute(sql)
    raw.close()


def test_attributes_that_json_has_no_word_for_are_refused_with_the_move(journal):
    journal.add_acquisition(acquisition())
    with pytest.raises(ValueError, match="JSON"):
        journal.move_acquisition(acquisition().id, A.GROWING, A.READY, attrs={"x": float("nan")})
    assert journal.acquisition(acquisition().id).state is A.GROWING


# --- cost


def plan(path, sql, values):
    raw = sqlite3.connect(path)
    try:
        return [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    finally:
        raw.close()


def steps_of(journal, work):
    """Virtual machine steps that SQLite needs for some work: a cost without a clock."""
    count = itertools.count()
    connection = journal._db._connection
    connection.set_progress_handler(lambda: next(count) and 0, 1)
    work()
    connection.set_progress_handler(None, 1)
    return next(count)


def test_cost_of_one_acquisition_does_not_grow(journal):
    def one_life(n):
        one = acquisition(b"life %d" % n)
        journal.latest("scope", one.relpath)
        journal.add_acquisition(one)
        journal.move_acquisition(one.id, A.GROWING, A.READY, frames=3)
        journal.acquisitions({A.READY}, limit=16)
        journal.move_acquisition(one.id, A.READY, A.STAGED, digest=DIGEST)
        journal.acquisitions({A.STAGED, A.READY}, limit=16)
        journal.add_job(job(one.id))
        for start, end in itertools.pairwise((J.PLANNED, J.SUBMITTING, J.SUBMITTED, J.REDUCED)):
            journal.jobs_in(ACTIVE_JOB_STATES)
            journal.move_job(job_name(one.id, 1), start, end)
        journal.jobs(one.id)
        journal.events(trace=one.trace)
        journal.find(one.id[:10])
        journal.move_acquisition(one.id, A.STAGED, A.DONE)
        journal.acquisitions(limit=10, newest_first=True)
        journal.events(after=journal.events(trace=one.trace)[-1][0])

    for n in range(20):
        one_life(n)
    few = max(steps_of(journal, lambda n=n: one_life(n)) for n in range(100, 103))
    with journal.transaction():
        for n in range(10_000):
            one = acquisition(b"%d" % n, state=A.DONE)
            journal.add_acquisition(one)
            journal.add_job(job(one.id, state=J.REDUCED))
    many = max(steps_of(journal, lambda n=n: one_life(n)) for n in range(200, 203))
    assert few > 500  # the counter counts
    assert many < few * 1.1


@pytest.mark.parametrize(
    ("sql", "values", "index"),
    [
        ("SELECT * FROM acquisition WHERE share = ? AND relpath = ? ORDER BY generation DESC", "ab", "autoindex"),
        ("SELECT * FROM acquisition WHERE state = ? ORDER BY seq LIMIT 3", "a", "acquisition_state"),
        ("SELECT * FROM event WHERE trace IN (?) AND number > ? ORDER BY number", "ab", "event_trace"),
        ("SELECT * FROM event WHERE name IN (?, ?) AND number > 3 ORDER BY number", "ab", "event_name"),
        ("SELECT * FROM acquisition WHERE id >= ? AND id < ?", "ab", "autoindex"),
    ],
)
def test_queries_use_an_index(tmp_path, sql, values, index):
    Journal(tmp_path / "j").close()
    said = plan(tmp_path / "j", sql, tuple(values))
    assert index in said[0], said
    assert said[0].startswith("SEARCH"), said


# --- the file


def test_settings_of_the_file(tmp_path):
    connection = open_database(tmp_path / "j")
    said = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    timeout = connection.execute("PRAGMA busy_timeout").fetchone()[0]
    connection.close()
    assert said == {"journal_mode": "wal", "synchronous": 2}
    assert timeout >= 1000


def test_a_released_step_is_never_edited():
    """What changes the tables, or adds a state to an enum, needs a new step: old files never see an edited one."""
    digests = [hashlib.sha256(" ".join(" ".join(step.sql).split()).encode()).hexdigest()[:16] for step in STEPS]
    assert digests == ["ed5753f0b8624ffb", "40cea86894187e68"]


def test_checks_refuse_a_state_that_nobody_knows(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.add_acquisition(acquisition())
    raw = sqlite3.connect(tmp_path / "j")
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        raw.execute("UPDATE acquisition SET state = 'LOST'")
    raw.close()


MORE = Step(len(STEPS) + 1, "a note", ("ALTER TABLE job ADD COLUMN note TEXT NOT NULL DEFAULT 'n'",))
BROKEN = Step(len(STEPS) + 2, "broken", ("CREATE TABLE extra (x) STRICT",))


def test_an_older_file_is_brought_up_to_date_with_its_rows(tmp_path):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.add_acquisition(acquisition(state=A.STAGED))
        journal.add_job(job(acquisition().id))
    connection = open_database(path, steps=(*STEPS, MORE))
    assert connection.execute("PRAGMA user_version").fetchone()[0] == len(STEPS) + 1
    assert connection.execute("SELECT note FROM job").fetchone()[0] == "n"
    connection.close()
    with pytest.raises(JournalError, match="newer emflow"):
        Journal(path)


def test_a_failing_step_leaves_the_old_version_whole(tmp_path):
    path = tmp_path / "j"
    Journal(path).close()
    with pytest.raises(sqlite3.OperationalError):
        open_database(path, steps=(*STEPS, MORE, BROKEN))
    with Journal(path) as journal:
        assert journal.acquisitions() == []


def test_steps_are_numbered_without_gaps(tmp_path):
    raw = sqlite3.connect(tmp_path / "j")
    with pytest.raises(AssertionError, match="1, 2, 3"):
        migrate(raw, (*STEPS, BROKEN), path=tmp_path / "j")
    raw.close()


def test_another_database_is_not_taken_over(tmp_path):
    raw = sqlite3.connect(tmp_path / "j")
    raw.execute("CREATE TABLE mine (x)")
    raw.close()
    with pytest.raises(JournalError, match="not a journal"):
        Journal(tmp_path / "j")


def test_who_only_looks_neither_makes_nor_changes_a_journal(tmp_path):
    with pytest.raises(Unavailable, match="emflow run"):
        Journal(tmp_path / "j", read_only=True)
    assert list(tmp_path.iterdir()) == []
    with Journal(tmp_path / "j") as journal:
        journal.add_acquisition(acquisition())
    with Journal(tmp_path / "j", read_only=True) as journal:
        assert len(journal.acquisitions()) == 1
        with pytest.raises(NotAllowed):
            journal.move_acquisition(acquisition().id, A.GROWING, A.READY)


@pytest.mark.parametrize("damage", ["header", "page", "text"])
def test_a_damaged_file_is_refused_with_the_way_out(tmp_path, damage):
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal, journal.transaction():
        for n in range(300):
            journal.add_acquisition(acquisition(b"%d" % n))
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:100] = b"x" * 100
    elif damage == "page":
        data[8192:-4096] = b"\xaa" * (len(data) - 8192 - 4096)
    else:
        data[:] = b"hello"
    path.write_bytes(data)
    with pytest.raises(JournalError, match=r"Keep a copy .* emflow rebuild"):
        Journal(path)
    assert path.read_bytes() == bytes(data)


def test_a_folder_name_that_looks_like_a_query_is_only_a_name(tmp_path):
    folder = tmp_path / "a?mode=memory#x%41"
    folder.mkdir()
    with Journal(folder / "j") as journal:
        journal.add_acquisition(acquisition())
    assert (folder / "j").stat().st_size > 0


def test_events_in_the_file_are_plain_json(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.merge([event()])
    raw = sqlite3.connect(tmp_path / "j")
    [(text,)] = raw.execute("SELECT attrs FROM event").fetchall()
    raw.close()
    assert json.loads(text) == {"x": [1, "\udc80"]}


def _move_until_it_fails(journal):
    with journal.transaction():
        for start, end in itertools.cycle([(A.GROWING, A.STALLED), (A.STALLED, A.GROWING)]):
            journal.move_acquisition(acquisition().id, start, end, attrs={"x": "y" * 5000})


def test_a_full_disk_undoes_the_move_and_passes(journal):
    """SQLite rolls the whole transaction back by itself then; with room again everything goes on."""
    journal.add_acquisition(acquisition())
    connection = journal._db._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(NoSpace) as caught:
        _move_until_it_fails(journal)
    assert (caught.value.exit_code, caught.value.retryable) == (69, True)
    assert journal.acquisition(acquisition().id) == acquisition()
    connection.execute("PRAGMA max_page_count = 1000000")
    journal.move_acquisition(acquisition().id, A.GROWING, A.READY)
    assert [e.name for _, e in journal.events()] == ["noticed", "ready"]


def test_a_journal_that_another_process_holds_is_busy(tmp_path):
    with Journal(tmp_path / "j") as mine, Journal(tmp_path / "j") as theirs:
        mine._db._connection.execute("PRAGMA busy_timeout = 50")
        with theirs.transaction():
            with pytest.raises(Busy, match="another process"):
                mine.add_acquisition(acquisition())
            assert mine.acquisitions() == []
        assert mine.add_acquisition(acquisition())


def test_a_file_of_before_jobs_had_a_cost(tmp_path):
    old = open_database(tmp_path / "j", steps=STEPS[:1])
    one, first = acquisition(state=A.STAGED), job(acquisition().id)
    columns = values_of(one)
    old.execute(
        f"INSERT INTO acquisition ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", [*columns.values()]
    )
    columns = {k: v for k, v in values_of(first).items() if k not in ("memory_mib", "nodes", "started_ns")}
    old.execute(f"INSERT INTO job ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", [*columns.values()])
    old.close()
    with Journal(tmp_path / "j") as journal:
        assert journal.job(first.name) == first
        assert journal.usage.of_job(first.name) == {}
        journal.usage.book(first.name, {"2026-01-01": 1.0, "2026-01-02": 2.0})
        journal.usage.book(first.name, {"2026-01-02": 3600.0})
        assert journal.usage.of_job(first.name) == {"2026-01-02": 3600.0}
        assert (journal.usage.of_day("2026-01-02"), journal.usage.of_acquisition(one.id)) == (1.0, 1.0)


def test_a_job_that_stays_is_changed_only_in_its_state(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.add_acquisition(acquisition(state=A.STAGED))
        first = job(acquisition().id)
        journal.add_job(first)
        changed = journal.update_job(first.name, first.state, reason="waits", memory_mib=5)
        assert (changed.reason, changed.memory_mib, changed.state) == ("waits", 5, first.state)
        with pytest.raises(StaleState):
            journal.update_job(first.name, J.RUNNING, reason="no")
        with pytest.raises(ValueError, match="can't be changed"):
            journal.update_job(first.name, first.state, recipe="other")
        assert journal.count((A.STAGED, A.READY)) == 1
        assert journal.count((A.DONE,)) == 0
