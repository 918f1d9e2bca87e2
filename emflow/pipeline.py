"""The service: a table of steps, run whenever a hint, a timer or a finished copy wakes it."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emflow.config import OWN_FOLDERS, Config, Watch, default_match
from emflow.errors import Busy, ConfigError, JournalError, JournalFull
from emflow.journal import Journal
from emflow.prober import Prober
from emflow.recipes import load_recipe
from emflow.records import ACTIVE_JOB_STATES, AcquisitionState, Job, JobState
from emflow.registry import load, names, target
from emflow.runs import RunFolders, lock
from emflow.steps import economy
from emflow.steps.context import RETRY_S, Context, Look, Watched, log, open_alarms
from emflow.steps.examine import examine
from emflow.steps.follow import end_jobs, follow
from emflow.steps.notice import notice
from emflow.steps.plan import plan
from emflow.steps.stage import stage
from emflow.steps.submit import submit
from emflow.watch.hints import choose
from emflow.watch.scan import Scanner
from emflow.watch.settle import Settling
from mpi_kernels.contract import Recipe

STEPS: tuple[Callable[[Context], None], ...] = (notice, examine, stage, follow, plan, submit, economy.tell)
"""In the order of an acquisition's way, so that one turn carries it through several; a job that is followed to its end
makes room for the next one that is planned."""

LONGEST_NAP_S = 0.5
"""How late at most the service sees what another process (``emflow retry``) wrote into the journal."""


class Pipeline:
    """One running service over one journal.

    Parameters
    ----------
    context : Context
        Its parts, as `open_pipeline` puts them together.
    woken : int
        File descriptor that becomes readable when `Context.wake` is called.
    """

    def __init__(self, context: Context, woken: int) -> None:
        self.context = context
        self._woken = woken
        self._journal_away = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(woken, selectors.EVENT_READ)
        for watched in context.watches.values():
            fd = watched.hints.fileno()
            if fd >= 0:
                self._selector.register(fd, selectors.EVENT_READ)

    def turn(self) -> bool:
        """Run every step once; True if anything moved."""
        journal = self.context.journal
        before = journal.changes
        try:
            if journal.changed_elsewhere():
                load_looks(self.context)
            self.context.scheduler.tend()
            for step in STEPS:
                step(self.context)
            if self._journal_away:
                load_looks(self.context)
        except (JournalFull, Busy) as error:  # nothing can be recorded, so nothing is done
            if not self._journal_away:
                log.error("alarm: %s", error)
            self._journal_away = True
            self.context.alarms["journal"] = str(error)
            self._nap(RETRY_S)
            return False
        if self._journal_away:
            self._journal_away = False
            self.context.alarms.pop("journal", None)
            log.info("the journal can be written again")
        return journal.changes != before

    def run_forever(self) -> None:
        """Work until `stop`."""
        while not self.context.stopping.is_set():
            if not self.turn():
                self._nap(self._until_due())

    def run_once(self) -> None:
        """Work until everything that is there is done, set aside, or incomplete and unchanged."""
        for watched in self.context.watches.values():
            watched.scanner.mark_all()
        while not self.context.stopping.is_set():
            if self.turn():
                continue
            if self._idle():
                return
            self._nap(self._until_due())

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler and from other threads."""
        self.context.stopping.set()
        self.context.wake()

    def _idle(self) -> bool:
        """Whether all that is left waits for a writer, for a person, or for what an alarm tells of."""
        context = self.context
        looks = (look for look in context.looks.values() if look.waiting)
        if self._journal_away:
            return True
        if context.transfers or not all(f"trouble {look.acquisition.id}" in context.alarms for look in looks):
            return False
        waiting = context.journal.acquisitions({AcquisitionState.READY, AcquisitionState.STAGED}, limit=1)
        active = [job for job in context.journal.jobs_in(ACTIVE_JOB_STATES) if not self._held_up(job)]
        return not active and (not waiting or bool(context.alarms))

    def _held_up(self, job: Job) -> bool:
        alarms = self.context.alarms
        if f"trouble {job.name}" in alarms:
            return True
        unsent = job.state in (JobState.PLANNED, JobState.SUBMITTING)
        return self.context.waits(job.name) and bool(alarms) if unsent else "scheduler poll" in alarms

    def _until_due(self) -> float:
        context, now = self.context, self.context.clock()
        due = [now + LONGEST_NAP_S]
        due += [watched.scanner.next_due() for watched in context.watches.values()]
        due += [look.due for look in context.looks.values()]
        context.not_before = {key: when for key, when in context.not_before.items() if when > now}
        due += context.not_before.values()
        if context.journal.jobs_in(ACTIVE_JOB_STATES):
            due.append(now + context.config.scheduler.poll_s)
        return max(0.0, min(due) - now)

    def _nap(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fd == self._woken:
                os.eventfd_read(self._woken)


def load_looks(context: Context) -> None:
    """Take up every unfinished acquisition of the journal: at the start, and after another process wrote to it."""
    unfinished = context.journal.acquisitions({AcquisitionState.GROWING, AcquisitionState.STALLED})
    looks = context.looks
    context.looks = {}
    for acquisition in unfinished:
        known = looks.get(acquisition.id)
        same = known is not None and known.acquisition.state is acquisition.state
        context.looks[acquisition.id] = known if known is not None and same else Look(acquisition)
        if acquisition.share in context.watches:
            context.watches[acquisition.share].scanner.activate(acquisition.relpath)


@contextlib.contextmanager
def open_pipeline(config: Config) -> Iterator[Pipeline]:
    """Put the parts together, with the lock on the state folder first; everything is closed again on the way out."""
    for name in OWN_FOLDERS:
        folder: Path = getattr(config.service, name)
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(config.service.state))
        runs = RunFolders(config.service.runs)
        path = config.service.state / "journal.sqlite"
        if not path.exists() and runs.has_acquisitions():
            raise JournalError(
                f"{path} is not there, but {config.service.runs} holds acquisitions",
                next_step="Make the journal anew from them: emflow rebuild. A new start needs new, empty folders",
            )
        journal = stack.enter_context(Journal(path))
        woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        stack.callback(os.close, woken)
        scheduler = load("schedulers", config.scheduler.use).from_config(config)
        stack.callback(scheduler.close)
        prober = Prober({name: target("formats", name) for name in names("formats")})
        stack.callback(prober.close)
        pool = stack.enter_context(ThreadPoolExecutor(config.transfer.workers, thread_name_prefix="stage"))
        context = Context(
            config=config,
            journal=journal,
            runs=runs,
            results=config.service.results,
            scheduler=scheduler,
            prober=prober,
            pool=pool,
            watches={w.share: _watched(w, config, journal, stack) for w in config.watch},
            settling=Settling(config.scan.settle_s, config.scan.stable_s),
            degraded=degraded_recipe(config),
            wake=lambda: os.eventfd_write(woken, 1),
        )
        for name in open_alarms(journal):  # of a service that has ended; what still holds is told again
            context.alarms[name] = ""
            context.clear_alarm(name)
        load_looks(context)
        stack.callback(end_jobs, context)
        stack.callback(context.stopping.set)
        yield Pipeline(context, woken)


def degraded_recipe(config: Config) -> Recipe | None:
    """The recipe of jobs that are near a cap; None where none is set.

    Raises
    ------
    ConfigError
        It has the name of another one: the journal could not tell them apart.
    """
    if not config.caps.degraded:
        return None
    degraded = load_recipe(config.caps.degraded, relative_to=config.folder)
    for watch in config.watch:
        whole = load_recipe(watch.recipe, relative_to=config.folder)
        if whole.name == degraded.name and whole != degraded:
            raise ConfigError(
                f"[caps] degraded and the recipe of share {watch.share!r} are both called {whole.name!r}",
                next_step="Give one of them another name",
            )
    return degraded


def _watched(watch: Watch, config: Config, journal: Journal, stack: contextlib.ExitStack) -> Watched:
    hints = choose(watch.root, config.scan.hints)
    stack.callback(hints.close)
    scanner = Scanner(
        watch.root,
        match=watch.match or default_match(),
        ignore=watch.ignore,
        active_s=config.scan.active_s,
        recent_s=config.scan.recent_s,
        whole_s=config.scan.whole_s,
    )
    scanner.load((a.relpath, a.fingerprint) for a in journal.known(watch.share))
    hints.arm()
    return Watched(
        share=watch.share,
        root=watch.root,
        recipe=load_recipe(watch.recipe, relative_to=config.folder),
        scanner=scanner,
        hints=hints,
    )


@contextlib.contextmanager
def stopped_by_signals(pipeline: Pipeline) -> Iterator[list[int]]:
    """SIGINT and SIGTERM end the loop at the next step; yields the list of signals that came."""
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        pipeline.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # leases of emflow.watch.closed, see there
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        log.info("stopped")
