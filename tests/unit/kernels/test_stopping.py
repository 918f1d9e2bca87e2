"""Requests, whom they concern, and how far a job goes before it looks again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_kernels import agreement, failure, plan, stopping
from mpi_kernels.contract import JobSpec, Recipe, ReductionSpec, SourceSpec
from mpi_kernels.errors import MissingData
from mpi_kernels.formats.npy import Npy
from mpi_kernels.ranks import Ranks

JOB = "0123456789abcdef-01"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Nothing is asked for before and after a test, and USR1 is as it was."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)
    stopping.clear()
    stopping._ASKED.deadline = None


def test_a_request_concerns_its_job_or_whichever_runs() -> None:
    assert stopping.requested(JOB) is None
    stopping.request("cancelled", job=JOB)
    assert stopping.requested("0123456789abcdef-02") is None
    assert stopping.requested(JOB) == stopping.Request("cancelled", JOB)
    stopping.clear()
    assert stopping.requested(JOB) is None
    stopping.request("all of them")
    assert stopping.requested(JOB) == stopping.Request("all of them")


def test_usr1_is_a_limit_that_is_near() -> None:
    stopping.listen({})
    os.kill(os.getpid(), signal.SIGUSR1)
    asked = stopping.requested(JOB)
    assert asked == stopping.Request("SIGUSR1, the time limit is near", limit=True)
    error = stopping.early(asked, 3, 10, "partial-1")
    assert (error.code, agreement.agreed(error), agreement.owner(error)) == ("time-limit", True, 0)


@pytest.mark.parametrize(
    ("limit", "limited"), [("", False), ("soon", False), ("29", False), ("30", True), ("1e4", True)]
)
def test_a_limit_of_the_job_script_counts_from_the_start(limit: str, limited: bool) -> None:
    environment = {"EMFLOW_TIME_LIMIT_S": limit}
    assert stopping.limited(environment) is limited
    stopping.listen(environment)
    assert stopping.requested(JOB) is None
    asked = stopping.requested(JOB, ahead_s=1e5)  # the next look would be too late
    assert (asked is not None and asked.limit) is limited


def planned(tmp_path: Path, frames: int = 40) -> tuple[JobSpec, plan.Plan, Any]:
    data = np.random.default_rng(2).poisson(3, (frames, 16, 16)).astype("<u2")
    np.save(tmp_path / "a.npy", data)
    source = Npy().open(str(tmp_path / "a.npy"))
    spec = ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="pattern")
    recipe = Recipe(name="r", reductions=(spec,))
    job = JobSpec(
        job=JOB,
        acquisition=JOB[:16],
        trace="t",
        recipe=recipe,
        source=SourceSpec(path=str(tmp_path / "a.npy"), format="mpi_kernels.formats.npy:Npy"),
    )
    return job, plan.make(recipe, source.header), source


@pytest.mark.parametrize("first_bytes", [1, 512 * 3, 512 * 39, 1 << 30])
def test_slices_cover_every_frame_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_bytes: int) -> None:
    monkeypatch.setattr(stopping, "FIRST_BYTES", first_bytes)
    monkeypatch.setattr(stopping, "SLICE_S", 0.0)  # each as short as can be
    job, made, source = planned(tmp_path)
    told: list[tuple[int, int]] = []
    reduced, asked, done = stopping.reduce_in_slices(
        job, made, source, Ranks(), progress=lambda part, of: told.append((part, of))
    )
    source.close()
    assert (asked, done) == (None, 40)
    assert reduced is not None
    assert reduced.covered.all()
    np.testing.assert_array_equal(reduced.arrays["pattern"]["sum"], np.load(tmp_path / "a.npy").sum(axis=0))
    assert told == sorted(told)
    assert {of for _, of in told} <= {40}


def test_a_request_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    job, made, source = planned(tmp_path)
    stopping.request("cancelled")
    reduced, asked, done = stopping.reduce_in_slices(job, made, source, Ranks())
    source.close()
    assert (reduced, done) == (None, 0)
    assert asked is not None
    assert str(stopping.early(asked, 0, 40, "")).startswith("cancelled: ended after 0 of 40 frames. ")


def test_a_request_after_the_last_frame_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, made, source = planned(tmp_path)
    seen = stopping.Visit.add

    def add(self: Any, *args: Any) -> None:
        seen(self, *args)
        stopping.request("too late")

    monkeypatch.setattr(stopping.Visit, "add", add)
    reduced, asked, done = stopping.reduce_in_slices(job, made, source, Ranks())
    source.close()
    assert (asked, done) == (None, 40)
    assert reduced is not None


@pytest.mark.parametrize(("took_s", "wanted"), [(0.01, 80), (0.1, 80), (0.5, 20), (2.0, 5), (1000.0, 1)])
def test_the_next_slice_takes_about_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took_s: float, wanted: int
) -> None:
    monkeypatch.setattr(stopping, "FIRST_BYTES", 10 * 512)
    job, made, source = planned(tmp_path)
    source.close()
    made = replace(made, header=replace(made.header, scan_shape=(10_000,)))
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    leader = stopping._Leader(job.job, made, 1)
    assert leader.next(0) == (None, 10)
    now[0] += took_s
    assert leader.next(10) == (None, wanted)
    assert stopping._Leader(job.job, made, 64).next(0) == (None, 64)  # never less than what lies together
    assert leader.next(10_000 - 1) == (None, 1)


def test_what_one_rank_raises_together_is_marked() -> None:
    def fail() -> None:
        raise MissingData("gone", frame=3)

    with pytest.raises(MissingData) as caught:
        agreement.together(Ranks(), fail)
    assert agreement.agreed(caught.value)
    assert agreement.owner(caught.value) == 0
    assert not agreement.agreed(MissingData("gone"))


def test_sigterm_waits_for_nobody() -> None:
    def stopped() -> None:
        raise failure.Stopped(signal.SIGTERM)

    with pytest.raises(failure.Stopped) as caught:
        agreement.together(Ranks(), stopped)
    assert not agreement.agreed(caught.value)
