"""The journal can be lost: what the run folders prove comes back, and what they cannot prove is asked again."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emflow.errors import Busy, EmflowError, JournalError
from emflow.journal import Journal
from emflow.journal_schema import STEPS, open_database
from emflow.rebuild import rebuild
from emflow.records import (
    Acquisition,
    AcquisitionState,
    Fingerprint,
    Job,
    JobState,
    MemberCopy,
    Transfer,
    acquisition_id,
    job_name,
)
from emflow.runs import AcquisitionFile, RunFolders, lock
from mpi_kernels import jsonfile
from mpi_kernels.contract import Claim, ErrorRecord, Event, JobSpec, Recipe, ReductionSpec, ResultManifest, SourceSpec

A, J = AcquisitionState, JobState
DIGEST = "0123456789abcdef" * 2
RECIPE = Recipe(name="default", reductions=(ReductionSpec(use="m:A", name="a"),))


class Lab:
    """A journal and run folders that are filled as the service and its jobs do."""

    def __init__(self, folder):
        self.folder = Path(folder)
        (self.folder / "state").mkdir(parents=True)
        self.path = self.folder / "state" / "journal.sqlite"
        self.runs = RunFolders(self.folder / "runs")
        self.journal = Journal(self.path)

    def stage(self, relpath, generation=0, supersedes=None, day="2024-05-06"):
        key = acquisition_id("scope", relpath, generation)
        print_ = Fingerprint(size=len(relpath), mtime_ns=2**70, ctime_ns=3)
        one = Acquisition(
            id=key,
            share="scope",
            relpath=relpath,
            generation=generation,
            state=A.READY,
            day=day,
            trace=key,
            seen_ns=generation,
            changed_ns=2,
            fingerprint=print_,
            format="npy",
            kind="stack",
            frames=4,
            supersedes=supersedes,
        )
        self.journal.add_acquisition(one)
        member = MemberCopy(relpath=relpath, suffix=".npy", fingerprint=print_, xxh3_128=DIGEST)
        transfer = Transfer(members=(member,), path="/s/\udcff", digest=DIGEST, bytes=1, seconds=0.1)
        self.runs.write_acquisition(AcquisitionFile.of(one, transfer))
        return self.journal.move_acquisition(key, A.READY, A.STAGED, digest=DIGEST)

    def job(self, one, attempt, way):
        """A job that goes a way of states; its files are written where the service and the job write them."""
        job = Job(
            name=job_name(one.id, attempt),
            acquisition=one.id,
            attempt=attempt,
            state=J.PLANNED,
            recipe="default",
            scheduler="local",
            planned_ns=attempt,
        )
        self.journal.add_job(job)
        source = SourceSpec(path="/s", format="m:F", digest=DIGEST)
        folder = self.runs.write_job(
            JobSpec(
                job=job.name,
                acquisition=one.id,
                trace=one.trace,
                recipe=RECIPE,
                source=source,
                scheduler=job.scheduler,
                planned_ns=job.planned_ns,
            ),
            one.day,
        )
        for start, end in itertools.pairwise((J.PLANNED, *way)):
            self._files(job, one, folder, end)
            columns = {"scheduler_id": "77"} if end is J.RUNNING else {}
            self.journal.move_job(job.name, start, end, reason="final: broke" if end is J.FAILED else "", **columns)
        return folder

    def _files(self, job, one, folder, state):
        facts = {"job": job.name, "host": "n", "wall_ns": 9}
        if state is J.RUNNING:
            (folder / "claim").write_bytes(jsonfile.encode(Claim(pid=1, scheduler_id="77", **facts)))
        if state is J.FAILED:
            error = ErrorRecord(
                code="x", message="broke", path=None, frame=None, next_step="", retryable=False, rank=0, traceback="",
                **facts,
            )  # fmt: skip
            jsonfile.publish(folder / "error.json", jsonfile.encode(error))
        if state is J.REDUCED:
            manifest = ResultManifest(
                acquisition=one.id, trace=one.trace, recipe="default", result="result.h5", result_sha256="", ranks=1,
                preview=None, outputs=(), scalars={}, skipped=(), frames=4, coverage=1.0, partial=False, quality="OK",
                quality_reasons=(), seconds={}, source_digest=DIGEST, program="", **facts,
            )  # fmt: skip
            jsonfile.publish(folder / "result.json", jsonfile.encode(manifest))

    def rebuilt(self, **options):
        self.journal.close()
        counts = rebuild(self.runs, self.path, **options)
        self.journal = Journal(self.path)
        return counts

    def facts(self):
        """All that must survive; dates of changes are the rebuild's own."""
        acquisitions = [msgspec.structs.replace(a, changed_ns=0) for a in self.journal.acquisitions()]
        jobs = [msgspec.structs.replace(j, changed_ns=0) for a in acquisitions for j in self.journal.jobs(a.id)]
        return sorted(acquisitions, key=lambda a: a.id), sorted(jobs, key=lambda j: j.name)


@pytest.fixture
def lab(tmp_path):
    made = Lab(tmp_path)
    yield made
    made.journal.close()


# ways whose end the files prove, or the closest earlier state from which the service goes on by asking
WAYS = {
    (J.SUBMITTING,): J.SUBMITTING,
    (J.SUBMITTING, J.SUBMITTED): J.SUBMITTING,
    (J.SUBMITTING, J.SUBMITTED, J.RUNNING): J.RUNNING,
    (J.SUBMITTING, J.SUBMITTED, J.RUNNING, J.UNKNOWN): J.RUNNING,
    (J.SUBMITTING, J.SUBMITTED, J.RUNNING, J.REDUCED): J.REDUCED,
    (J.SUBMITTING, J.SUBMITTED, J.RUNNING, J.FAILED): J.FAILED,
    (J.SUBMITTING, J.FAILED): J.FAILED,
}
PROVED = [way for way, end in WAYS.items() if way[-1] is end]


@pytest.mark.parametrize(("way", "end"), WAYS.items())
def test_state_of_a_job_is_what_its_files_prove(lab, way, end):
    one = lab.stage(b"a")
    lab.job(one, 1, way)
    counts = lab.rebuilt()
    assert (counts.acquisitions, counts.jobs, counts.problems) == (1, 1, ())
    assert lab.journal.job(job_name(one.id, 1)).state is end
    assert lab.journal.acquisition(one.id).state is (A.DONE if end is J.REDUCED else A.STAGED)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.binary(min_size=1, max_size=20), unique=True, min_size=1, max_size=4),
    ways=st.lists(st.lists(st.sampled_from(PROVED), max_size=3), min_size=4, max_size=4),
    again=st.booleans(),
)
def test_what_is_rebuilt_is_what_was(tmp_path_factory, names, ways, again):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    for name, jobs in zip(names, ways, strict=False):
        one = lab.stage(name)
        for attempt, way in enumerate(jobs, 1):
            lab.job(one, attempt, way)
        if any(way[-1] is J.REDUCED for way in jobs):
            lab.journal.move_acquisition(one.id, A.STAGED, A.DONE)
        if again:  # the file was rewritten: its first content gives way to the second
            lab.stage(name, generation=1, supersedes=one.id)
            lab.journal.move_acquisition(one.id, {A.STAGED, A.DONE}, A.SUPERSEDED)
    before, told = lab.facts(), [event for _, event in lab.journal.events()]
    counts = lab.rebuilt()
    assert counts.problems == ()
    assert lab.facts() == before
    assert [event for _, event in lab.journal.events()][: len(told)] == told
    lab.journal.close()
    shutil.rmtree(lab.folder)


def test_nothing_but_the_folders_is_needed(lab):
    one = lab.stage(b"a\xff")
    lab.job(one, 1, PROVED[2])
    before = lab.facts()
    lab.journal.close()
    shutil.rmtree(lab.folder / "state")
    counts = lab.rebuilt()
    assert counts.backup is None
    acquisitions, jobs = lab.facts()
    assert acquisitions == [msgspec.structs.replace(before[0][0], state=A.DONE)]
    assert jobs == before[1]


def test_done_only_where_the_copy_for_people_is_there(lab):
    shown, hidden = lab.stage(b"a"), lab.stage(b"b")
    for one in (shown, hidden):
        lab.job(one, 1, PROVED[2])
    results = lab.folder / "results"
    results.mkdir()
    (results / f"{shown.id}_emflow.h5").touch()
    lab.rebuilt(results=results)
    assert [lab.journal.acquisition(a.id).state for a in (shown, hidden)] == [A.DONE, A.STAGED]


def event(seq, host="n"):
    return Event(trace="t", subject="s", plane="data", host=host, pid=1, seq=seq, name="read", wall_ns=seq, mono_ns=1)


def test_events_of_jobs_come_back_once(lab):
    one = lab.stage(b"a")
    folder = lab.job(one, 1, PROVED[2])
    (folder / "events-n-1.jsonl").write_bytes(b"".join(jsonfile.encode(event(n)) + b"\n" for n in (1, 2)))
    lab.journal.merge([event(1)])
    lab.rebuilt()
    assert [e.seq for _, e in lab.journal.events(trace="t")] == [1, 2]
    assert lab.rebuilt().events > 0
    assert [e.seq for _, e in lab.journal.events(trace="t")] == [1, 2]


def test_torn_and_foreign_files_are_told_and_the_rest_goes_on(lab):
    good, torn, damaged = lab.stage(b"good"), lab.stage(b"torn"), lab.stage(b"damaged")
    lab.job(good, 1, PROVED[2])
    (lab.runs.acquisition_folder(torn.day, torn.id) / "acquisition.json").write_text('{"id": "')
    first = lab.job(damaged, 1, PROVED[1])
    second = lab.job(damaged, 2, PROVED[1])
    third = lab.job(damaged, 3, PROVED[2])
    fourth = lab.job(damaged, 4, PROVED[3])
    (first / "job.json").write_text("[]")
    (second / "claim").write_bytes(b"")  # made, and then the node died
    (third / "result.json").write_bytes((fourth / "error.json").read_bytes())
    (fourth / "error.json").write_text("[" * 100_000)
    (lab.runs.root / good.day / ("e" * 16)).mkdir()
    (lab.runs.root / good.day / "lost+found").mkdir()
    # the same run folder, copied under another day by hand
    copied = lab.runs.root / "2025-01-01" / good.id
    shutil.copytree(lab.runs.acquisition_folder(good.day, good.id), copied)
    copied_file = copied / "acquisition.json"
    copied_file.write_text(copied_file.read_text().replace(good.day, "2025-01-01"))

    counts = lab.rebuilt()
    assert counts.acquisitions == 2
    assert lab.journal.acquisition(good.id).state is A.DONE
    assert [j.state for j in lab.journal.jobs(damaged.id)] == [J.FAILED, J.RUNNING, J.RUNNING, J.RUNNING]
    assert lab.journal.job(job_name(damaged.id, 1)).reason == "job.json is damaged"
    told = "\n".join(counts.problems)
    for name in (torn.id, "job.json", "claim", "result.json", "nested too deeply", "there twice"):
        assert name in told
    assert "lost+found" not in told


def test_a_damaged_journal_is_kept_and_replaced(lab):
    one = lab.stage(b"a")
    lab.journal.close()
    lab.path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(JournalError, match="emflow rebuild"):
        Journal(lab.path)
    counts = lab.rebuilt()
    assert Path(counts.backup).read_bytes() == b"nonsense" * 1000
    assert Path(counts.backup).name.startswith("journal.")
    assert Path(counts.backup).name.endswith(".bak")
    assert any("events are not taken over" in problem for problem in counts.problems)
    assert lab.journal.acquisition(one.id).state is A.STAGED


LEAVES_A_LOG = """
import os, signal, sys
from emflow.journal import Journal
from emflow.journal_schema import STEPS, open_database
journal = Journal(sys.argv[1])
journal.append(subject="s", trace="last", plane="data", name="n")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_old_log_goes_with_the_old_journal(lab):
    """After kill -9 commits are still in the -wal file, which must never be played into the new journal."""
    one = lab.stage(b"a")
    lab.journal.close()
    killed = subprocess.run([sys.executable, "-c", LEAVES_A_LOG, str(lab.path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert lab.path.with_name("journal.sqlite-wal").stat().st_size > 0
    counts = lab.rebuilt()
    assert len(lab.journal.events(trace="last")) == 1
    assert lab.journal.acquisition(one.id).state is A.STAGED
    with Journal(counts.backup) as old:
        assert len(old.events(trace="last")) == 1


def test_refused_while_a_service_runs(lab):
    lab.stage(b"a")
    before = lab.path.read_bytes()
    with lock(lab.path.parent), pytest.raises(Busy) as caught:
        rebuild(lab.runs, lab.path)
    assert caught.value.pid == os.getpid()
    assert lab.path.read_bytes() == before


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from emflow.rebuild import rebuild
from emflow.runs import RunFolders
at = int(sys.argv[3])
seen = 0
def count(event, args):
    global seen
    if event in ("os.rename", "os.remove") and "journal" in str(args[0]):
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
rebuild(RunFolders(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_at_any_rename_only_another_rebuild_goes_on(lab):
    one = lab.stage(b"a")
    lab.job(one, 1, PROVED[1])
    before = lab.facts()
    lab.journal.close()
    kills = refusals = 0
    for at in itertools.count(1):
        script = [sys.executable, "-c", KILLED_AT, str(lab.runs.root), str(lab.path), str(at)]
        code = subprocess.run(script, check=False).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        try:
            journal = Journal(lab.path)
        except JournalError as error:
            assert "rebuil" in str(error)  # noqa: PT017
            refusals += 1
        else:  # killed before anything was touched, or after all was done
            with journal:
                assert journal.acquisition(one.id).state is A.STAGED
        lab.rebuilt()
        assert lab.facts() == before
        lab.journal.close()
    assert kills >= 2
    assert refusals >= 1
    lab.journal = Journal(lab.path)
    assert lab.facts() == before


def test_an_empty_runs_folder_does_not_wipe_a_journal_that_knows_more(lab):
    one = lab.stage(b"a")
    lab.journal.close()
    lab.runs.root.rename(lab.folder / "not mounted")
    for there in (False, True):
        if there:
            lab.runs.root.mkdir()
        before = lab.path.read_bytes()
        with pytest.raises(EmflowError, match=r"the journal knows 1: is runs mounted\?") as caught:
            rebuild(lab.runs, lab.path)
        assert caught.value.exit_code == 1
        assert lab.path.read_bytes() == before
        assert [p.name for p in lab.path.parent.glob("journal*.new*")] == []
    with Journal(lab.path) as journal:
        assert journal.acquisition(one.id).state is A.STAGED
    counts = lab.rebuilt(force=True)
    assert counts.acquisitions == 0
    with Journal(counts.backup) as old:
        assert old.acquisition(one.id).state is A.STAGED


def test_with_nothing_known_and_nothing_found_there_is_nothing_to_refuse(lab):
    assert lab.rebuilt().acquisitions == 0


def test_what_jobs_cost_is_taken_over(lab):
    """From the old journal where it can tell; else of one node, from the claim to the last word."""
    one = lab.stage(b"a")
    lab.job(one, 1, (J.SUBMITTING, J.SUBMITTED, J.RUNNING, J.FAILED))
    lab.job(one, 2, (J.SUBMITTING, J.SUBMITTED, J.RUNNING, J.REDUCED))
    first, second = job_name(one.id, 1), job_name(one.id, 2)
    error = lab.runs.job_folder(one.day, first) / "error.json"
    error.write_bytes(error.read_bytes().replace(b'"wall_ns":9', b'"wall_ns":36000000000009'))
    lab.journal.usage.book(second, {"1970-01-01": 7200.0, "1970-01-02": 3600.0})
    lab.rebuilt()
    assert lab.journal.usage.of_job(first) == {"1970-01-01": 36000.0}
    assert lab.journal.usage.of_job(second) == {"1970-01-01": 7200.0, "1970-01-02": 3600.0}
    lab.journal.close()
    for path in lab.path.parent.glob("journal.*"):
        path.unlink()
    lab.journal = Journal(lab.path)
    lab.rebuilt()
    assert lab.journal.usage.of_acquisition(one.id) == 10.0


def test_memory_and_nodes_of_an_attempt_are_taken_over(lab):
    one = lab.stage(b"a")
    lab.job(one, 1, (J.SUBMITTING, J.SUBMITTED))
    lab.journal.move_job(job_name(one.id, 1), J.SUBMITTED, J.RUNNING, memory_mib=2048, nodes=4, started_ns=5)
    lab.rebuilt()
    job = lab.journal.job(job_name(one.id, 1))
    assert (job.memory_mib, job.nodes, job.started_ns) == (2048, 4, 5)


def test_events_of_a_journal_of_an_older_emflow_are_taken_over(lab):
    one = lab.stage(b"a")
    lab.journal.close()
    backup = lab.path.with_name("of-before.sqlite")
    lab.path.rename(backup)
    old = open_database(lab.path, steps=STEPS[:1])
    old.execute("ATTACH ? AS now", (str(backup),))
    for table in ("acquisition", "event"):
        old.execute(f"INSERT INTO main.{table} SELECT * FROM now.{table}")
    old.close()
    counts = lab.rebuilt()
    assert counts.problems == ()
    assert [event.name for _, event in lab.journal.events(subject=one.id)][-2:] == ["staged", "rebuilt"]
