"""Begins an experiment, or takes one up again: policy, recipe, folder, log."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import msgspec

from emflow import __version__, registry
from emflow.agent.control import ActiveClock, Control
from emflow.agent.folders import folder_of, held
from emflow.agent.log import ExperimentLog
from emflow.agent.progress import Progress
from emflow.agent.protocol import AgentMode, Policy, StopRules
from emflow.agent.records import Record, Resumed, Started, State
from emflow.agent.telling import status_of
from emflow.config import Config, Watch
from emflow.errors import ConfigError, UsageError, printable
from emflow.recipes import load_recipe
from mpi_kernels.contract import Recipe
from mpi_kernels.events import EventLog, host_name


@dataclass
class Experiment:
    """An experiment that this process runs."""

    config: Config
    folder: Path
    started: Started
    policy: Policy
    recipe: Recipe
    log: ExperimentLog
    progress: Progress
    events: EventLog
    control: Control
    clock: ActiveClock
    resumed: bool
    state: State = "starting"

    @property
    def id(self) -> str:
        """The experiment's id."""
        return self.started.experiment

    def record(self, *records: Record) -> None:
        """Write records to the log, and only then go by them."""
        self.log.append(*records, active_s=self.clock.seconds)
        for record in records:
            self.progress.apply(record)
        self.show()

    def show(self, state: State | None = None, *, held: str = "") -> None:
        """Tell people how it is."""
        self.state = state or self.state
        self.control.publish(status_of(self.log, self.progress, self.state, self.clock.seconds, held=held))


# --- the policy


def make_policy(name: str, parameters: Mapping[str, Any]) -> tuple[Policy, str]:
    """A policy with its parameters, and its ``module:attr``.

    Raises
    ------
    ConfigError
        There is no such policy, or a parameter is unknown or wrong; the known ones are named.
    """
    cls = registry.load("policies", name)
    if not (isinstance(cls, type) and issubclass(cls, msgspec.Struct)):
        raise ConfigError(f"policy {name!r} is no msgspec.Struct", next_step="See emflow.agent.protocol.Policy")
    known = [field.name for field in msgspec.structs.fields(cls)]
    has = f"It has: {', '.join(known) or 'none'}"
    if unknown := [p for p in parameters if p not in known]:
        raise ConfigError(
            f"policy {name!r} has no parameter '{printable(unknown[0])}'",
            next_step=has,
        )
    try:
        policy = msgspec.convert(dict(parameters), cls, strict=False)
    except ValueError as error:
        raise ConfigError(f"policy {name!r}: {printable(str(error))}", next_step=has) from None
    try:
        msgspec.json.decode(msgspec.json.encode(policy), type=cls)
    except ValueError as error:  # NaN, or text that is no Unicode
        why = f"a parameter can't be written into a log: {printable(str(error))}"
        raise ConfigError(f"policy {name!r}: {why}", next_step=has) from None
    if not isinstance(policy, Policy):
        raise ConfigError(f"{name!r} lacks what a policy needs", next_step="See emflow.agent.protocol.Policy")
    return policy, registry.target("policies", name)


def share_of(config: Config) -> Watch:
    """The share that the microscope writes to.

    Raises
    ------
    ConfigError
        [microscope] names one that is not watched.
    """
    name = config.microscope.share
    found = next((w for w in config.watch if w.share == (name or config.watch[0].share)), None)
    if found is None:
        known = ", ".join(w.share for w in config.watch)
        raise ConfigError(f"[microscope] writes to share {name!r}, which is not watched", next_step=f"Known: {known}")
    return found


def reductions_for(config: Config, policy: Policy, name: str, share: Watch) -> tuple[str, ...]:
    """Names of the reductions that a policy reads, after a look that the share's recipe makes them.

    Raises
    ------
    ConfigError
        It does not; the message says which recipe to set.
    """
    needed = load_recipe(policy.recipe, relative_to=config.folder)
    made = load_recipe(share.recipe, relative_to=config.folder)
    lacking = [r.name for r in needed.reductions if r not in made.reductions]
    if lacking:
        raise ConfigError(
            f"policy {name!r} reads {', '.join(lacking)}, which recipe {made.name!r} of share {share.share!r} "
            "does not make so",
            next_step=f'Set recipe = "{policy.recipe}" in the [[watch]] of that share, and restart emflow run',
        )
    cheaper = load_recipe(config.caps.degraded, relative_to=config.folder) if config.caps.degraded else made
    lacking = [r.name for r in needed.reductions if r not in cheaper.reductions]
    if lacking:
        raise ConfigError(
            f"policy {name!r} reads {', '.join(lacking)}, which recipe {cheaper.name!r} ([caps] degraded) does not "
            "make so: near a cap its results could not be used",
            next_step="Name a recipe there that makes them, or none; and restart emflow run",
        )
    return tuple(r.name for r in needed.reductions)


# --- begin or take up again


@contextlib.contextmanager
def opened(
    config: Config,
    control: Control,
    *,
    experiment: str,
    policy: str | None,
    parameters: Mapping[str, Any],
    mode: AgentMode | None,
) -> Iterator[Experiment]:
    """Open an experiment alone in its folder: a new one, or one that another process left.

    Raises
    ------
    UsageError
        There is nothing to take up, it has ended, or it runs another policy.
    Busy
        Another agent runs it.
    """
    folder = folder_of(config.service.experiments, experiment)
    if policy is None and not folder.is_dir():
        raise UsageError(f"there is no experiment {experiment}", next_step="Start one with: emflow agent --policy NAME")
    # what is wrong is said before there is a folder
    fresh = None if policy is None else _started(config, experiment, policy, parameters, mode)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(folder))
        log = stack.enter_context(ExperimentLog(folder))
        progress = Progress(line.record for line in log.lines)
        resumed = progress.started is not None
        started = _same(progress, policy, parameters, mode) if resumed else fresh
        if started is None:
            raise UsageError(f"experiment {experiment} has not begun", next_step="Give its policy: --policy NAME")
        made, target = make_policy(started.policy, started.parameters)
        if target != started.target:
            raise ConfigError(f"policy {started.policy!r} is {target} now, was {started.target} when it began")
        share = share_of(config)
        if share.share != started.share:
            raise ConfigError(f"[microscope] writes to share {share.share!r} now, was {started.share!r} when it began")
        reductions_for(config, made, started.policy, share)
        _warm()
        yield Experiment(
            config=config,
            folder=folder,
            started=started,
            policy=made,
            recipe=load_recipe(made.recipe, relative_to=config.folder),
            log=log,
            progress=progress,
            events=stack.enter_context(EventLog(folder, "control", experiment, experiment)),
            control=control,
            clock=ActiveClock(log.lines[-1].active_s if log.lines else 0.0),
            resumed=resumed,
        )


def _same(progress: Progress, policy: str | None, parameters: Mapping[str, Any], mode: AgentMode | None) -> Started:
    """The first record of an experiment that goes on, after a look that nobody asks for another one."""
    started = cast("Started", progress.started)
    if progress.ended:
        raise UsageError(
            f"experiment {started.experiment} has ended: {progress.ended.ending.value} ({progress.ended.reason})",
            next_step="Look at it with: emflow replay " + started.experiment,
        )
    if policy not in (None, started.policy):
        raise UsageError(f"experiment {started.experiment} runs policy {started.policy!r}, not {policy!r}")
    if mode not in (None, started.mode):
        raise UsageError(
            f"experiment {started.experiment} began in mode {started.mode!r}, not {mode!r}",
            next_step="Leave --mode out to go on in the mode in which it began, or start another experiment",
        )
    asked = make_policy(started.policy, parameters)[0] if parameters else None
    if asked is not None and msgspec.to_builtins(asked) != started.parameters:
        raise UsageError(
            f"experiment {started.experiment} began with other parameters: {printable(str(started.parameters))}",
            next_step="Leave -p out to go on with them",
        )
    return started


def _started(
    config: Config, experiment: str, name: str, parameters: Mapping[str, Any], mode: AgentMode | None
) -> Started:
    policy, target = make_policy(name, parameters)
    share, agent = share_of(config), config.agent
    return Started(
        experiment=experiment,
        policy=name,
        target=target,
        parameters=msgspec.to_builtins(policy),
        mode=mode or agent.mode,
        rules=StopRules(
            max_acquisitions=agent.max_acquisitions,
            max_dose_e=agent.max_dose_e,
            max_time_s=agent.max_time_s,
            no_improvement=agent.no_improvement,
        ),
        share=share.share,
        recipe=policy.recipe,
        reductions=reductions_for(config, policy, name, share),
        controls=tuple(policy.controls),
        programs={"emflow": __version__, "python": platform.python_version(), "numpy": version("numpy")},
    )


def begun(experiment: Experiment) -> None:
    """Write the first record, or that another process goes on."""
    if experiment.resumed:
        experiment.record(Resumed(host=host_name(), pid=os.getpid()))
    else:
        experiment.record(experiment.started)


def _warm() -> None:
    """Load before the first wait what a result is read with: it would be part of the first answer's time."""
    import h5py  # noqa: F401
    import numpy as np

    np.linalg.lstsq(np.eye(2), np.ones(2), rcond=None)
