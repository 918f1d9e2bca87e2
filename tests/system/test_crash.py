"""kill -9 of the service at every commit, and at every fsync and rename: one result, no torn file."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow.records import AcquisitionState, JobState

pytestmark = [pytest.mark.needs_strace, pytest.mark.timeout(900)]


def traced(place, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the service once under strace, which follows threads only if ``-f`` is among the options."""
    return subprocess.run(
        ["strace", "-qq", "-o", str(place.folder / "strace.log"), *options, "--", *place.command("run", "--once")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=place.folder,
    )


def fill(place) -> None:
    np.save(place.share / "scan.npy", np.arange(3 * 4 * 5 * 6, dtype=np.uint16).reshape(3, 4, 5, 6))


def calls(place, name: str) -> dict[str, int]:
    """How often each thread made a call; without ``-f`` there is one thread and no number before it."""
    found = re.findall(rf"^(?:(\d+) +)?{name}\(", (place.folder / "strace.log").read_text(), re.MULTILINE)
    return dict(Counter(found))


def converged(place) -> None:
    """After a restart: one result, made once, whole; nothing half-written under a final name."""
    done = place.emflow("run", "--once", code=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.states() == {"scan.npy": AcquisitionState.DONE}
    assert len(place.results) == 1
    with h5py.File(place.results[0]) as file:
        assert int(np.asarray(file["pattern/sum/data"]).sum()) == sum(range(3 * 4 * 5 * 6))
    with place.journal() as journal:
        (acquisition,) = journal.acquisitions()
        jobs = journal.jobs(acquisition.id)
        assert [j.state for j in jobs].count(JobState.REDUCED) == 1
        assert all(j.state in (JobState.REDUCED, JobState.FAILED) for j in jobs)
    manifests = list((place.folder / "runs").rglob("result.json"))
    assert len(manifests) == 1


def sweep(make_place: Callable[..., object], names: tuple[str, ...], *options: str, **settings: object) -> int:
    """Kill at the n-th call of each kind, for every n that a thread reaches in one run."""
    counting = make_place(**settings)
    fill(counting)
    assert traced(counting, *options, "-e", f"trace={','.join(names)}").returncode == 0
    kills = 0
    for name in names:
        for n in range(1, max(calls(counting, name).values(), default=0) + 1):
            place = make_place(**settings)
            fill(place)
            killed = traced(place, *options, "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={n}")
            assert killed.returncode == -9, f"the kill at {name} {n} did not fire: {killed.returncode} {killed.stderr}"
            converged(place)
            kills += 1
    return kills


def test_killed_at_every_commit(make_place) -> None:
    # with synchronous=FULL each commit of the journal is one fdatasync of the main thread: this is every state change
    assert sweep(make_place, ("fdatasync",)) >= 8


@pytest.mark.slow
def test_killed_at_every_commit_with_real_jobs(make_place) -> None:
    assert sweep(make_place, ("fdatasync",), scheduler="local") >= 8


@pytest.mark.slow
def test_killed_at_every_file_operation_of_the_main_thread(make_place) -> None:
    assert sweep(make_place, ("fsync", "rename", "mkdir", "unlink")) >= 15


@pytest.mark.slow
def test_killed_while_a_thread_copies(make_place) -> None:
    # the first thread to reach the n-th call is killed, with all others: for the small n that is the copying one
    assert sweep(make_place, ("fsync", "rename"), "-f") >= 5


def test_killed_while_a_job_runs(make_place, tmp_path: Path) -> None:
    """A job outlives its service and is adopted, not sent again."""
    place = make_place(scheduler="local", stall_s=30, quarantine_s=60)
    shape = (64, 64, 128, 128)
    np.lib.format.open_memmap(place.share / "scan.npy", mode="w+", dtype=np.uint16, shape=shape).flush()
    service = place.start()

    def submitted() -> bool:
        with place.journal() as journal:
            return any(j.scheduler_id for j in journal.jobs_in(frozenset(JobState)))

    service.until(submitted)
    with place.journal() as journal:
        (job,) = journal.jobs_in(frozenset(JobState))
    service.kill()
    assert Path(f"/proc/{job.scheduler_id.split('@')[0]}").exists()  # it works on, and nobody waits for it
    with place.start() as second:
        second.until_state("scan.npy", AcquisitionState.DONE, timeout_s=60)
    with place.journal() as journal:
        (acquisition,) = journal.acquisitions()
        assert [j.attempt for j in journal.jobs(acquisition.id)] == [1]
