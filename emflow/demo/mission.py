"""The closed loop of the demonstration: a microscope, the service and the agent, each a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from emflow.agent.protocol import Ending
from emflow.agent.records import Ended
from emflow.config import Config, load
from emflow.demo.figure import Estimate, draw, read_image
from emflow.demo.processes import Part, alive, broken, running, wait
from emflow.demo.progress import Stage, ending, experiment_of, records, stages
from emflow.errors import EmflowError
from emflow.journal import Journal
from emflow.microscope.simulated.truth import truth
from emflow.records import AcquisitionState
from emflow.runs import RunFolders
from emflow.schedulers.local import LocalScheduler
from emflow.timeline import acquisition_events, loop_times

CONFIGURATION = """\
[[watch]]
root = "microscope"
share = "demo"
recipe = "aberrations"

[transfer]
min_free = "64 MiB"

[scheduler]
use = "local"
ranks = 2
poll_s = 0.05

[microscope]
address = "{address}"
patience_s = 5.0

[agent]
mode = "auto"
max_acquisitions = 12
"""
SETTINGS = """\
[server]
address = "127.0.0.1:0"
folder = "microscope"
state = "microscope-state"

[backend]
use = "simulated"

[backend.parameters]
seed = {seed}
writing = "rows"
time_scale = 1.0

[limits.controls]
C10_nm = {{ min = -1500.0, max = 1500.0, max_step = 1000.0, per_minute = 240, tolerance = 0.5 }}
C12a_nm = {{ min = -500.0, max = 500.0, max_step = 300.0, per_minute = 240, tolerance = 0.5 }}
C12b_nm = {{ min = -500.0, max = 500.0, max_step = 300.0, per_minute = 240, tolerance = 0.5 }}
"""
POLICY = "correct_aberrations"
STATE, TOML = "microscope-state/backend", "emflow.toml"
LISTENS = re.compile(r"listens on (\S+);")
"""In the one line that a microscope's server says."""
AGENT_END_S = 3.0
"""An agent that is told to end stops its scan first, and waits longer for a microscope that is gone."""
START_S, TIME_LIMIT_S, PUBLISH_S = 60.0, 300.0, 60.0
"""How long start, loop and the last copy may take: much more than they do, for a machine that is busy."""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What the demonstration ended with: sizes of the true aberrations, nm, at its end and at its start."""

    residuals_nm: dict[str, float]
    start_nm: dict[str, float]
    acquisitions: int
    seconds: float
    figure: str


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """`Shown`, and what is said in words: why the experiment ended."""

    shown: Shown
    ended: Ended

    @property
    def reached(self) -> bool:
        """Whether the policy's end point was reached."""
        return self.ended.ending is Ending.TARGET


def show(folder: Path, figure: Path, seed: int, update: Callable[[list[Stage]], None]) -> Told:
    """Run the loop in ``folder`` to its end and draw ``figure``; ``update`` gets the stages several times a second.

    Raises
    ------
    EmflowError
        A process ended early, or it took too long; the log's end is in the text.
    """
    begin = time.monotonic()
    settings = prepare(folder, seed)
    parts: list[Part] = []
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(microscope(settings, parts))
        config = configure(folder, address)
        toml = str(folder / TOML)
        stack.enter_context(no_orphans(config))
        parts.append(stack.enter_context(running("service", ["-c", toml, "run"], folder)))
        # the agent starts beside the service: it waits for what is not there yet
        agent = ["-c", toml, "agent", "--policy", POLICY, "--mode", "auto", "--json"]
        parts.append(stack.enter_context(running("agent", agent, folder, end_s=AGENT_END_S)))
        journal = stack.enter_context(open_journal(config, parts[:2]))
        experiment, ended = _follow(journal, config, parts, update)
        seen = _published(journal, config, parts[:2], experiment)
        update(seen)
        true = sizes(truth(folder / STATE))
        _draw(figure, journal, config, seen, true)
    shown = Shown(
        residuals_nm=true[1],
        start_nm=true[0],
        acquisitions=len(seen),
        seconds=round(time.monotonic() - begin, 2),
        figure=str(figure),
    )
    return Told(shown=shown, ended=ended)


def prepare(folder: Path, seed: int) -> Path:
    """Make the share and write the microscope's settings; returns their file."""
    (folder / "microscope").mkdir(parents=True)
    path = folder / "microscope.toml"
    path.write_text(SETTINGS.format(seed=seed), encoding="utf-8")
    return path


def configure(folder: Path, address: str) -> Config:
    """Write the configuration of service and agent, and load it."""
    toml = folder / TOML
    toml.write_text(CONFIGURATION.format(address=address), encoding="utf-8")
    return load(toml)


@contextlib.contextmanager
def microscope(settings: Path, parts: list[Part]) -> Iterator[str]:
    """Serve a microscope, as one of ``parts``; its address, where the system gave it a free port."""
    with running("microscope", ["microscope", "serve", "--settings", str(settings)], settings.parent) as part:
        parts.append(part)

        def said() -> str | None:
            found = LISTENS.search(part.out.read_text("utf-8", "replace"))
            return found[1] if found else None

        yield wait(said, [part], START_S, "the start of the microscope")


def sizes(true: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Sizes of C10 and C12, nm, with all controls at 0 and as they are, from the simulator's answer."""
    start, now = (
        {
            "C10": round(abs(true[f"{prefix}C10_nm"]), 3),
            "C12": round(math.hypot(true[f"{prefix}C12a_nm"], true[f"{prefix}C12b_nm"]), 3),
        }
        for prefix in ("hidden_", "")
    )
    return start, now


@contextlib.contextmanager
def no_orphans(config: Config) -> Iterator[None]:
    """End the jobs of a service that was killed when the block ends; one that was not has ended them itself."""
    try:
        yield
    finally:
        scheduler, runs = LocalScheduler(), RunFolders(config.service.runs)
        folders = [job for acquisition in runs.acquisition_folders() for job in runs.job_folders(acquisition)]
        found = (scheduler.find(f"{folder.parent.name}-{folder.name}", folder) for folder in folders)
        scheduler.cancel(*itertools.chain.from_iterable(found))


@contextlib.contextmanager
def open_journal(config: Config, parts: Sequence[Part]) -> Iterator[Journal]:
    """The journal, as soon as the service, the last of ``parts``, has made it."""
    path = config.service.state / "journal.sqlite"

    def opened() -> Journal | None:
        try:
            return Journal(path, read_only=True)
        except EmflowError:
            return None

    with wait(opened, parts, START_S, "the start of the service") as journal:
        yield journal


def _follow(
    journal: Journal, config: Config, parts: Sequence[Part], update: Callable[[list[Stage]], None]
) -> tuple[str, Ended]:
    """Look on until the agent, the last of ``parts``, says that the experiment is over; its id and end."""
    *others, agent = parts
    experiment = wait(lambda: experiment_of(config), parts, START_S, "the start of an experiment")
    until = time.monotonic() + TIME_LIMIT_S
    while True:
        over = agent.ended
        known = ending(records(config, experiment))
        update(stages(journal, config, experiment))
        if known is not None:
            # it gives its lease back; only then nobody misses the microscope
            wait(lambda: agent.ended or None, others, START_S, "the end of the agent")
            return experiment, known
        if over:
            alive(parts)
        alive(others)
        if time.monotonic() > until:
            raise broken(f"the experiment did not end within {TIME_LIMIT_S:g} s", agent)
        time.sleep(0.15)


def _published(journal: Journal, config: Config, parts: Sequence[Part], experiment: str) -> list[Stage]:
    """Wait until the service has published the last result; the agent did not have to."""

    def done() -> list[Stage] | None:
        seen = stages(journal, config, experiment)
        states = [journal.acquisition(stage.acquisition).state for stage in seen]
        return None if any(state is not AcquisitionState.DONE for state in states) else seen

    return wait(done, parts, PUBLISH_S, "the last result")


def _draw(
    figure: Path, journal: Journal, config: Config, seen: Sequence[Stage], true: Sequence[Mapping[str, float]]
) -> None:
    if not seen:
        return
    ends = {"before: the first scan": seen[0], "after: the last scan": seen[-1]}
    images = {
        title: read_image(config.service.results / f"{stage.acquisition}_emflow.h5") for title, stage in ends.items()
    }
    estimates = [
        Estimate(acquisition=s.number, merit=s.decision.merit, trusted=s.decision.trusted) for s in seen if s.decision
    ]
    events = [acquisition_events(journal, config, journal.acquisition(stage.acquisition)) for stage in seen]
    # the newest one that was followed by a command: everything had run before, and no step is missing
    whole = [one for one in events if "next" in loop_times(one)]
    draw(figure, images, estimates, true, (whole or events)[-1])
