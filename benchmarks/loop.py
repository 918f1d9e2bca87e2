"""The closed loop: how near it comes to the truth, how long from the last byte to the decision, and the RPC alone.

Real processes over real files, as in ``emflow demo``: one service with the local scheduler for all experiments; for
each seed a simulated microscope and an agent of its own.  The truth is asked from the simulator after each experiment.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import summary
from emflow.agent.policies.correct_aberrations import CorrectAberrations
from emflow.agent.records import Received
from emflow.config import Config
from emflow.demo.mission import POLICY, TOML, configure, microscope, no_orphans, open_journal, sizes
from emflow.demo.processes import Part, broken, running, wait
from emflow.demo.progress import records, stages
from emflow.errors import EmflowError
from emflow.journal import Journal
from emflow.microscope.client import LeaseKeeper, MicroscopeClient
from emflow.microscope.protocol import Command, Outcome, Set, command_id
from emflow.microscope.simulated.parameters import ABERRATIONS
from emflow.microscope.simulated.truth import truth
from emflow.records import AcquisitionState
from emflow.timeline import LOOP_BARS, acquisition_events, loop_times

SETTINGS = """\
[server]
address = "127.0.0.1:0"
folder = "microscope"
state = "state-{run}"

[backend]
use = "{use}"

[backend.parameters]
seed = {seed}
drift_nm_per_s = [0.08, 0.06]
electrons_per_us = {electrons}
writing = "rows"
{more}

[limits.controls]
C10_nm = {{ min = -3000.0, max = 3000.0, max_step = 1500.0, per_minute = 100000, tolerance = 0.5 }}
C12a_nm = {{ min = -3000.0, max = 3000.0, max_step = 1500.0, per_minute = 100000, tolerance = 0.5 }}
C12b_nm = {{ min = -3000.0, max = 3000.0, max_step = 1500.0, per_minute = 100000, tolerance = 0.5 }}
"""
GOAL_NM = 5.0
EXPERIMENT_S = 300.0
ELECTRONS_PER_US = 30.0
SCRAMBLED = "benchmarks._scrambled:Scrambled"
STEPS = tuple(LOOP_BARS)[tuple(LOOP_BARS).index("written") :]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=20, help="experiments (default %(default)s)")
    parser.add_argument("--ungated-seeds", type=int, default=20, help="the same without the gate (default %(default)s)")
    parser.add_argument(
        "--faulty-seeds", type=int, default=5, help="with scrambled scans, with and without gate (default %(default)s)"
    )
    parser.add_argument("--faulty-share", type=float, default=0.5, help="of scans scrambled (default %(default)s)")
    parser.add_argument("--calls", type=int, default=2000, help="calls of status (default %(default)s)")
    parser.add_argument("--sets", type=int, default=300, help="commands that set a control (default %(default)s)")


def main(args: argparse.Namespace) -> dict[str, object]:
    """Residuals by seed and way, latencies of the undisturbed experiments, and calls over loopback."""
    share = args.faulty_share
    ways = {
        "gate": (args.seeds, 0.0, True),
        "no gate": (args.ungated_seeds, 0.0, False),
        "scrambled, gate": (args.faulty_seeds, share, True),
        "scrambled, no gate": (args.faulty_seeds, share, False),
    }
    # the microscope's process finds the plug-in of this package
    here = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    place = tempfile.TemporaryDirectory(prefix="emflow-loop-", dir=args.work.resolve())
    with place as name, laboratory(Path(name)) as lab:
        runs = {
            way: [lab.experiment(seed, scrambled, gate=gate) for seed in range(seeds)]
            for way, (seeds, scrambled, gate) in ways.items()
        }
        calls = rpc(lab, args.calls, args.sets)
    policy = CorrectAberrations()
    return {
        "conditions": {
            "start": "100 <= |C10| <= 600 nm, 0 < |C12| <= 150 nm, drawn by the simulator from the seed",
            "scan": f"{policy.shape[0]} x {policy.shape[1]} x 64 x 64 uint16, {policy.exposure_us:g} us a frame",
            "electrons_per_frame": ELECTRONS_PER_US * policy.exposure_us,
            "drift_nm_per_s": 0.1,
            "no gate": "the same policy with gate=false: every estimate is believed",
            "scrambled": f"of each scan's {share:g} chance: the image of every block of 8 x 8 detector pixels moved by "
            "a random vector before the scan is noted as whole; the same decisions are hit with and without the gate",
        },
        "convergence": {way: convergence(done) for way, done in runs.items() if done},
        "last_byte_to_decision": latency([times for done in runs["gate"] for times in done.times]),
        "rpc": calls,
        "by_seed": {way: [done.row for done in all_] for way, all_ in runs.items()},
    }


# --- experiments


@dataclass(frozen=True)
class Done:
    """One experiment: what is told of it, and the marks of its acquisitions, ns."""

    row: dict[str, Any]
    times: list[dict[str, int]]


@dataclass
class Laboratory:
    """A service that runs all the time; microscopes and agents come and go."""

    folder: Path
    config: Config
    journal: Journal
    service: Part
    runs: int = field(default=0)

    @contextlib.contextmanager
    def microscope(self, seed: int, scrambled: float) -> Iterator[tuple[str, Path]]:
        """Serve a fresh microscope; its address, and where its truth is."""
        self.runs += 1
        settings = self.folder / "microscope.toml"
        use, more = (SCRAMBLED, f"scrambled_share = {scrambled}") if scrambled else ("simulated", "")
        text = SETTINGS.format(run=self.runs, seed=seed, use=use, electrons=ELECTRONS_PER_US, more=more)
        settings.write_text(text, encoding="utf-8")
        parts: list[Part] = []
        with microscope(settings, parts) as address:
            yield address, self.folder / f"state-{self.runs}" / "backend"

    def experiment(self, seed: int, scrambled: float, *, gate: bool) -> Done:
        """Run the policy to its end on the microscope of a seed, and compare with the truth."""
        with self.microscope(seed, scrambled) as (address, state):
            configure(self.folder, address)
            begin = time.monotonic()
            # the id is part of the scans' names, and these choose what is scrambled
            options = [
                "--experiment",
                f"e{self.runs:012x}",
                "-p",
                f"gate={json.dumps(gate)}",
                "--mode",
                "auto",
                "--json",
            ]
            arguments = ["-c", TOML, "agent", "--policy", POLICY, *options]
            with running("agent", arguments, self.folder) as agent:
                wait(lambda: agent.ended or None, [self.service], EXPERIMENT_S, "the end of an experiment")
            seconds = time.monotonic() - begin
            said = agent.out.read_text().splitlines()
            if not said:
                raise broken("the agent told no end", agent)
            told = json.loads(said[-1])
            true = truth(state)
            start, left = sizes(true)
        worst = self._worst_nm(told["experiment"], true)
        row = {"seed": seed, "start_nm": start, "residual_nm": left, "worst_nm": worst, "seconds": round(seconds, 2)}
        row |= {key: told[key] for key in ("ending", "reason", "acquisitions")}
        return Done(row, self._times(told["experiment"]))

    def _worst_nm(self, experiment: str, true: Mapping[str, float]) -> float:
        """The largest true |C10| or |C12| after any command, nm."""
        found = max(sizes(true)[0].values())
        for record in records(self.config, experiment):
            if isinstance(record, Received):
                now = {name: true[f"hidden_{name}"] + record.receipt.after.get(name, 0.0) for name in ABERRATIONS}
                found = max(found, *sizes({**true, **now})[1].values())
        return found

    def _times(self, experiment: str) -> list[dict[str, int]]:
        """Marks of all acquisitions, once the service is through with them; their files are deleted."""

        def through() -> list[str] | None:
            ids = [stage.acquisition for stage in stages(self.journal, self.config, experiment)]
            done = all(self.journal.acquisition(id_).state is AcquisitionState.DONE for id_ in ids)
            return ids if done else None

        ids = wait(through, [self.service], EXPERIMENT_S, "the last result")
        acquisitions = [self.journal.acquisition(id_) for id_ in ids]
        times = [loop_times(acquisition_events(self.journal, self.config, one)) for one in acquisitions]
        for path in (self.folder / "microscope").glob(f"{experiment}-*"):
            path.unlink()
        for one in acquisitions:
            shutil.rmtree(self.config.service.runs / one.day / one.id)
        return times


@contextlib.contextmanager
def laboratory(folder: Path) -> Iterator[Laboratory]:
    """Start the service in a folder."""
    share = folder / "microscope"
    share.mkdir()
    (share / "README").write_text("keeps the share from being empty, which is an alarm\n", encoding="utf-8")
    config = configure(folder, "127.0.0.1:0")
    parts: list[Part] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_orphans(config))
        service = stack.enter_context(running("service", ["-c", TOML, "run"], folder))
        parts.append(service)
        journal = stack.enter_context(open_journal(config, parts))
        yield Laboratory(folder, config, journal, service)


# --- figures


def convergence(runs: Sequence[Done]) -> dict[str, object]:
    """How near experiments came to the truth, nm."""
    rows = [done.row for done in runs]
    left = {name: [row["residual_nm"][name] for row in rows] for name in ("C10", "C12")}
    return {
        "experiments": len(rows),
        "both_within_5_nm": sum(max(row["residual_nm"].values()) <= GOAL_NM for row in rows),
        "further_off_meanwhile_than_at_the_start": sum(row["worst_nm"] > max(row["start_nm"].values()) for row in rows),
        "further_off_at_the_end": sum(max(row["residual_nm"].values()) > max(row["start_nm"].values()) for row in rows),
        "residual_nm": {
            name: {"median": round(statistics.median(values), 2), "max": max(values)} for name, values in left.items()
        },
        "endings": dict(Counter(row["ending"] for row in rows)),
        "acquisitions": _spread([row["acquisitions"] for row in rows]),
        "seconds": _spread([row["seconds"] for row in rows]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "max": max(values)}


def latency(all_times: Sequence[Mapping[str, int]]) -> dict[str, object]:
    """From the last byte on the share to the decision, its steps, and the agent's own share of it."""
    whole = [t for t in all_times if {"written", "result", "found", "decided"} <= t.keys()]

    def between(first: str, last: str) -> list[float]:
        return [(t[last] - t[first]) / 1e9 for t in whole if first in t and last in t]

    return {
        "acquisitions": len(whole),
        "last_byte_to_decision": summary(between("written", "decided")),
        "last_byte_to_next_command": summary(between("written", "next")),
        "steps_median_ms": {
            f"{LOOP_BARS[last]} ({first} to {last})": round(1e3 * statistics.median(values), 2)
            for first, last in itertools.pairwise(STEPS)
            if (values := between(first, last))
        },
        "agent_result_visible_to_next_command": summary(between("result", "next")),
        "agent_result_seen_to_next_command": summary(between("found", "next")),
    }


def rpc(lab: Laboratory, calls: int, sets: int) -> dict[str, object]:
    """Calls of ``status``, and commands that set one control, over loopback; nothing else runs."""
    with lab.microscope(0, 0.0) as (address, _), contextlib.ExitStack() as stack:
        client = stack.enter_context(MicroscopeClient(address, role="agent", name="benchmark", patience_s=5.0))
        client.status()
        asked = [_timed(client.status) for _ in range(calls)]
        keeper = stack.enter_context(LeaseKeeper(client))
        done = [_timed(functools.partial(_set, client, keeper.lease.epoch, number)) for number in range(sets)]
    return {"status": summary(asked), "calls": calls, "set_one_control": summary(done), "sets": sets}


def _set(client: MicroscopeClient, epoch: int, number: int) -> None:
    name = command_id("e" + 12 * "0", number // 100, number % 100)
    action = Set(values={"C10_nm": float(number % 2)})
    command = Command(id=name, trace=name, action=action, epoch=epoch, not_after_s=time.monotonic() + 60.0)
    receipt = client.execute(command)
    if receipt.outcome is not Outcome.DONE:
        raise EmflowError(f"a command was not done: {receipt.code} {receipt.reason}")


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
