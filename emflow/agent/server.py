"""The agent as a process: one experiment at a time in a thread of its own, and a guarded Pyro5 object to talk to it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec

from emflow import registry, rpc
from emflow.agent.control import Control, Wish
from emflow.agent.folders import AGENT_FILE, AgentFile, folder_of, new_experiment, write_agent
from emflow.agent.loop import Loop
from emflow.agent.observing import Observer
from emflow.agent.opening import Experiment, begun, opened
from emflow.agent.protocol import AgentMode
from emflow.agent.records import AgentStatus, Ended
from emflow.agent.sending import Hand
from emflow.config import Config
from emflow.errors import Busy, EmflowError, UsageError, printable
from mpi_kernels.errors import KernelError
from mpi_kernels.events import host_name

OBJECT = "emflow.agent"
"""Name of the agent's object in its Pyro5 daemon."""

METHODS = ("start", "pause", "resume", "approve", "stop", "status")

_log = logging.getLogger(__name__)


class Agent:
    """Runs experiments, one at a time; what people ask of it may come from any thread.

    Parameters
    ----------
    config : Config
        The configuration of the service whose results are decided on.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._over.set()
        self._control: Control | None = None
        self._ready = threading.Event()
        self._told = threading.Event()
        self.address = ""
        self.experiment = ""
        self.ended: Ended | None = None
        self.error: Exception | None = None

    def begin(
        self,
        *,
        policy: str | None,
        parameters: Mapping[str, Any],
        mode: AgentMode | None = None,
        experiment: str | None = None,
    ) -> str:
        """Begin an experiment, or take one up again, and return its id once its first record is on the disk.

        Raises
        ------
        EmflowError
            Why it can't: a wrong policy, a microscope that somebody else holds, an experiment that has ended.
        """
        with self._lock:
            if not self._over.is_set():
                raise Busy(f"experiment {self.experiment} is running", next_step="Stop it first: emflow agent stop")
            self.experiment = experiment or new_experiment()
            folder_of(self._config.service.experiments, self.experiment)
            self._control, self.ended, self.error = Control(), None, None
            self._ready.clear()
            self._told.clear()
            self._over.clear()
            arguments = (self._control, policy, dict(parameters), mode)
            threading.Thread(target=self._run, args=arguments, name="emflow-agent", daemon=True).start()
        self._ready.wait()
        if not self._told.is_set():
            self.join()
            self.check()
        return self.experiment

    def check(self) -> None:
        """Raise what ended the experiment without a last record, if anything did."""
        if self.error is not None:
            raise self.error

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the experiment's end; whether it has ended."""
        # not Thread.join: one that Ctrl-C interrupts takes the thread for ended (python/cpython#90882)
        return self._over.wait(timeout_s)

    def status(self) -> AgentStatus:
        """How it is."""
        return self._control.status if self._control else AgentStatus(state="idle")

    def control(self) -> Control:
        """The running experiment's; UsageError if none runs."""
        if self._control is None or self._over.is_set():
            raise UsageError("no experiment is running", next_step="Start one with: emflow agent --policy NAME")
        return self._control

    def _run(self, control: Control, policy: str | None, parameters: dict[str, Any], mode: AgentMode | None) -> None:
        try:
            with opened(
                self._config, control, experiment=self.experiment, policy=policy, parameters=parameters, mode=mode
            ) as experiment:
                self.ended = self._experiment(experiment)
        except Exception as error:  # noqa: BLE001  handed to whoever waits for this thread
            self.error = error
            if self._told.is_set() and not isinstance(error, (EmflowError, KernelError, OSError)):
                _log.exception("experiment %s ended without a last record", self.experiment)
        finally:
            self._over.set()
            self._ready.set()

    def _experiment(self, experiment: Experiment) -> Ended:
        if experiment.started.mode in ("observe", "propose"):
            self._first(experiment)
            return Observer(experiment).run()
        with contextlib.closing(
            Hand(self._config.microscope, experiment.id, experiment.control, experiment.events)
        ) as hand:
            hand.take()
            if not experiment.resumed:
                hand.check_unused()
            self._first(experiment)
            return Loop(experiment, hand).run()

    def _first(self, experiment: Experiment) -> None:
        begun(experiment)
        if self.address:
            write_agent(experiment.folder, self._file())
        self._told.set()
        self._ready.set()

    def _file(self) -> AgentFile:
        return AgentFile(address=self.address, host=host_name(), pid=os.getpid(), experiment=self.experiment)


class AgentObject:
    """What the agent lets others call; each answers with a status, or with why not."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def status(self) -> dict[str, Any]:
        """How the agent is; the only method for a viewer."""
        plain: dict[str, Any] = msgspec.to_builtins(self._agent.status())
        return plain

    def start(self, policy: str, parameters: dict[str, Any], mode: str) -> dict[str, Any]:
        """Begin an experiment."""

        def begin(_: Wish) -> None:
            if not isinstance(policy, str) or not isinstance(parameters, dict) or mode not in get_args(AgentMode):
                raise UsageError("start takes a policy's name, its parameters and a mode")
            if policy not in registry.names("policies"):  # a module:attr imports code: only who is at the machine may
                known = ", ".join(registry.names("policies"))
                raise UsageError(f"no policy is called {policy[:80]!r}", next_step=f"Known: {known}")
            self._agent.begin(policy=policy, parameters=parameters, mode=mode)  # type: ignore[arg-type]

        return self._do(begin)

    def pause(self, reason: str = "") -> dict[str, Any]:
        """Decide and send nothing until `resume`."""
        return self._do(lambda wish: self._agent.control().pause(wish), reason)

    def resume(self, reason: str = "") -> dict[str, Any]:
        """End a pause or a hold."""
        return self._do(lambda wish: self._agent.control().resume(wish), reason)

    def approve(self, number: int, reason: str = "") -> dict[str, Any]:
        """Agree to the decision that waits for it, by its number."""

        def agree(wish: Wish) -> None:
            control, status = self._agent.control(), self._agent.status()
            if status.state != "asking" or status.number != number:
                what = f"decision {status.number} is {status.state}"
                raise UsageError(f"decision {number!r:.20} does not wait for approval", next_step=what)
            control.approve(status.number, wish)

        return self._do(agree, reason)

    def stop(self, reason: str = "") -> dict[str, Any]:
        """End the experiment; nothing of it is left running at the microscope."""
        return self._do(lambda wish: self._agent.control().stop(wish), reason)

    def _do(self, act: Any, reason: object = "") -> dict[str, Any]:
        who = rpc.caller()
        if who.role == "viewer":
            return rpc.refusal("not-allowed", "a viewer may only look")
        if not isinstance(reason, str):
            return rpc.refusal("malformed", "a reason is text")
        try:
            act(Wish(by=f"{who.role} {printable(who.name)}", reason=printable(reason[:500])))
        except (EmflowError, KernelError) as error:
            return rpc.refusal("refused", str(error))
        return self.status()


@contextlib.contextmanager
def served(config: Config, *, waiting: bool) -> Iterator[Agent]:
    """An agent with its object on the network (loopback); ``waiting``: for a start, so that it can be found before."""
    agent = Agent(config)
    with rpc.Server(config.agent.address, {OBJECT: (AgentObject(agent), METHODS)}) as server:
        server.start()
        agent.address = server.address
        note: Path | None = None
        if waiting:
            write_agent(config.service.experiments, agent._file())
            note = config.service.experiments / AGENT_FILE
        try:
            yield agent
        finally:
            if note is not None:
                note.unlink(missing_ok=True)
