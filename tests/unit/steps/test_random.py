"""Whatever a microscope, a person and kill -9 do in whatever order: nothing is lost, made twice, or touched."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from emflow.pipeline import STEPS
from emflow.records import ACQUISITION_MOVES, ACTIVE_JOB_STATES, AcquisitionState, JobState

A, J = AcquisitionState, JobState
REST = {A.DONE, A.QUARANTINED, A.STALLED, A.SUPERSEDED}
NAMES = ("one.npy", "deep/two.npy", b"\xff\n.npy".decode("utf-8", "surrogateescape"))


def content(version: int) -> np.ndarray:
    """A scan whose shape and counts depend on its version."""
    shape = (1 + version % 2, 2, 4, 5)
    return (np.arange(np.prod(shape), dtype=np.uint16) * 7 + version).reshape(shape)


@dataclasses.dataclass
class World:
    """A bench, and what a microscope has put on its share."""

    bench: object
    seconds: int = 1_700_000_000
    held: dict[str, object] = dataclasses.field(default_factory=dict)

    def path(self, name: str) -> Path:
        path = self.bench.share / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def dated(self, path: Path) -> None:
        """Give each write a time of its own: the clock of some file systems ticks only every few milliseconds."""
        self.seconds += 1
        os.utime(path, ns=(self.seconds * 10**9, self.seconds * 10**9))

    # --- the microscope

    def whole(self, name: str, version: int) -> None:
        with self.path(name).open("wb") as file:
            np.save(file, content(version))
        self.dated(self.path(name))

    def part(self, name: str, version: int) -> None:
        self.whole(name, version)
        os.truncate(self.path(name), self.path(name).stat().st_size * (version + 1) // 10)
        self.dated(self.path(name))

    def renamed(self, name: str, version: int) -> None:
        beside = self.path(name).with_name(".not-yet.tmp")
        with beside.open("wb") as file:
            np.save(file, content(version))
        self.dated(beside)
        beside.replace(self.path(name))

    def garbage(self, name: str, version: int) -> None:
        self.path(name).write_bytes(b"nonsense" * (version + 1))
        self.dated(self.path(name))

    def cut(self, name: str, version: int) -> None:
        if self.path(name).exists():
            os.truncate(self.path(name), min(version * 20, self.path(name).stat().st_size))
            self.dated(self.path(name))

    def touched(self, name: str, version: int) -> None:
        if self.path(name).exists():
            self.dated(self.path(name))

    def deleted(self, name: str, version: int) -> None:
        self.path(name).unlink(missing_ok=True)

    def folder(self, name: str, version: int) -> None:
        """A folder where a file was, and the other way round."""
        path = self.path(name)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
            path.mkdir()

    def opened(self, name: str, version: int) -> None:
        """A program holds it open for writing, until it does not."""
        if name in self.held:
            self.held.pop(name).close()
        elif self.path(name).is_file():
            self.held[name] = self.path(name).open("r+b")

    # --- the service

    def turns(self, name: str, version: int) -> None:
        for _ in range(1 + version % 4):
            self.bench.turn(0.7)

    def passed(self, name: str, version: int) -> None:
        self.bench.turn(3.0 * version)

    def killed(self, name: str, version: int) -> None:
        """In the middle of a turn; a worker's copy is finished, as if the kill had come a moment later."""
        for step in STEPS[: version % (len(STEPS) + 1)]:
            step(self.bench.context)
        wait(self.bench.context.transfers.values())
        self.bench.open()

    def release(self) -> None:
        for file in self.held.values():
            file.close()


ACTS = ("whole", "part", "renamed", "garbage", "cut", "touched", "deleted", "folder", "opened")
ON_FILES = frozenset(("whole", "part", "garbage"))
STEP = st.tuples(
    st.sampled_from(("turns", "turns", "passed", "killed", *ACTS, "whole")), st.sampled_from(NAMES), st.integers(0, 9)
)


def tree(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything on the share: kind or size, time, content."""
    found = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
        found[os.fspath(path)] = (facts.st_size if digest else -1, facts.st_mtime_ns, digest)
    return found


def held_at_any_time(bench) -> None:
    journal = bench.journal
    acquisitions = journal.acquisitions()
    by_path: dict[bytes, list] = {}
    for acquisition in acquisitions:
        by_path.setdefault(acquisition.relpath, []).append(acquisition)
        jobs = journal.jobs(acquisition.id)
        assert [j.state for j in jobs].count(J.REDUCED) <= 1
        assert sum(j.state in ACTIVE_JOB_STATES for j in jobs) <= 1
        assert list(moves(bench, acquisition.id))
        if acquisition.state is A.DONE:
            a_whole_result(bench, acquisition)
    for generations in by_path.values():
        assert [a.generation for a in generations] == list(range(len(generations)))
        assert sum(a.state in (A.STAGED, A.DONE) for a in generations) <= 1, "two results for one file"


def moves(bench, key: str) -> Iterator[A]:
    """Every state that an acquisition was in, each a legal move from the one before."""
    before = A.GROWING
    yield before
    for name in bench.told(key)[1:]:
        after = A[name.upper()]
        assert after in ACQUISITION_MOVES[before], f"{before} to {after}"
        yield after
        before = after
    assert before is bench.journal.acquisition(key).state


def a_whole_result(bench, acquisition) -> None:
    (job,) = [j for j in bench.journal.jobs(acquisition.id) if j.state is J.REDUCED]
    runs = bench.context.runs
    folder = runs.job_folder(acquisition.day, job.name)
    manifest = runs.read_result(folder)
    data = (folder / manifest.result).read_bytes()
    assert hashlib.sha256(data).hexdigest() == manifest.result_sha256
    published = bench.folder / "results" / f"{acquisition.id}_emflow.h5"
    assert published.read_bytes() == data
    transfer = runs.read_acquisition(acquisition.day, acquisition.id).transfer
    assert transfer.digest == acquisition.digest == manifest.source_digest
    staged = np.load(transfer.path)
    with h5py.File(published) as file:
        assert np.array_equal(file["pattern/sum/data"], staged.sum(axis=(0, 1), dtype=np.int64))


def held_at_the_end(bench) -> None:
    """After all writing has stopped."""
    acquisitions = bench.journal.acquisitions()
    assert {a.state for a in acquisitions} <= REST
    for name in NAMES:
        path = bench.share / name
        newest = bench.journal.latest("share", os.fsencode(name))
        if newest is None:
            assert not path.exists()
            continue
        try:
            data = np.load(path)
        except (OSError, ValueError, EOFError):
            if path.exists():
                assert newest.state in (A.QUARANTINED, A.STALLED), f"{name}: {newest}"
            continue
        standing = newest if newest.state is A.DONE else bench.journal.acquisition(newest.supersedes)
        assert standing.state is A.DONE, f"{name}: {newest}, {standing}"
        transfer = bench.context.runs.read_acquisition(standing.day, standing.id).transfer
        assert np.array_equal(np.load(transfer.path), data), f"{name}: the newest bytes have no result"
    assert len(bench.results) == len({a.id for a in acquisitions if had_result(bench, a.id)})


def had_result(bench, key: str) -> bool:
    return "done" in bench.told(key)


def scenario(make_bench, steps: list[tuple[str, str, int]]) -> None:
    world = World(make_bench().open())
    bench = world.bench
    (bench.share / "notes.txt").touch()  # a share that is empty at once looks unmounted, which is another story
    try:
        for act, name, version in steps:
            if act in ON_FILES and world.path(name).is_dir():
                world.path(name).rmdir()
            if act in ("renamed", "cut", "deleted") and world.path(name).is_dir():
                continue
            before = tree(bench.share)
            getattr(world, act)(name, version)
            if act not in ACTS:
                assert tree(bench.share) == before, "the share was written to"
                held_at_any_time(bench)
        world.release()
        before = tree(bench.share)
        bench.work(60)
        bench.turn(bench.scan.stall_s)
        bench.work(70)
        assert tree(bench.share) == before, "the share was written to"
        held_at_any_time(bench)
        held_at_the_end(bench)
        assert bench.context.alarms == {}
    finally:
        world.release()
        bench.close()
        shutil.rmtree(bench.folder)


HERE = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=120, derandomize=True, database=None, **HERE)
@given(st.lists(STEP, min_size=5, max_size=25))
@example([("whole", NAMES[0], 1), ("killed", NAMES[0], 3), ("whole", NAMES[0], 2), ("turns", NAMES[0], 3)])
def test_any_order_of_events(make_bench, steps: list[tuple[str, str, int]]) -> None:
    scenario(make_bench, steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=2000, database=None, **HERE)
@given(st.lists(STEP, min_size=5, max_size=40))
def test_any_order_of_many_events(make_bench, steps: list[tuple[str, str, int]]) -> None:
    scenario(make_bench, steps)
