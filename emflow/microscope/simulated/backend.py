"""A microscope of arithmetic behind the same door as a real one."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emflow.microscope.protocol import Aborted, Acquire, Acquired, InstrumentError
from emflow.microscope.simulated.column import Column
from emflow.microscope.simulated.detector import Counting
from emflow.microscope.simulated.exposure import expected
from emflow.microscope.simulated.optics import Aberrations
from emflow.microscope.simulated.parameters import ABERRATIONS, parse
from emflow.microscope.simulated.plan import Plan, plan
from emflow.microscope.simulated.specimen import grow
from emflow.microscope.simulated.writing import SUFFIXES, File, writing

ABORT_GRACE_S = 0.2
"""Whoever takes the beam away to stop a scan says so just before or just after."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


class SimulatedMicroscope:
    """A column with hidden aberrations, a drifting specimen, and detectors that count electrons.

    Implements `emflow.microscope.protocol.Microscope`.  The true aberrations are control + hidden; no method tells
    the hidden ones (`emflow.microscope.simulated.truth` reads them from the private folder).

    Parameters
    ----------
    folder : Path
        Where acquisitions are written.
    state : Path
        Private folder; a column that is there is taken over.
    parameters : mapping
        See `Parameters`.

    Raises
    ------
    ValueError
        A parameter is unknown or wrong, or ``state`` holds another column.

    Notes
    -----
    A 4D scan is ``counts(r, a) = Poisson(electrons per pixel x S(r + g(a) - stage - drift(t)))`` inside the disc,
    with g the gradient of the aberration function (`Aberrations.gradient`, Lupini, Chi, Jesse 2016,
    doi:10.1111/jmi.12372): geometrical optics, so no diffraction and no phase contrast.  A camera series is the same
    with the probe parked in the middle of the field: a shadow image whose local magnification is the inverse of chi's
    second derivatives.  A scan with one detector pixel counts what the specimen deflects, ``1 - S``, averaged over
    the probe.
    """

    def __init__(self, folder: Path, state: Path, parameters: Mapping[str, Any]) -> None:
        self._folder = folder
        self._parameters = parse(parameters)
        self._column = Column(state, self._parameters)
        self._specimen = grow(self._parameters.seed)

    def read(self) -> Mapping[str, float]:
        """All controls and their present values, nm."""
        return dict(self._column.state.controls)

    def set(self, values: Mapping[str, float]) -> None:
        """Bring controls to values, all or none; `InstrumentError` if one is unknown or out of reach."""
        self._column.set(values)

    def dose_e(self, action: Acquire) -> float:
        """Electrons that an acquisition puts on the specimen.

        Raises
        ------
        ValueError
            It can't be made: more than 4 GiB, or a step or time that is not positive.
        """
        return plan(action, self._parameters).dose_e

    def blank(self, blanked: bool) -> None:
        """Take the beam off the specimen, or put it back; kept over a restart."""
        self._column.blank(blanked)

    def blanked(self) -> bool:
        """Whether the beam is off the specimen."""
        return self._column.state.blanked

    def close(self) -> None:
        """Nothing is held: files are closed after each acquisition, the state is on the disk."""

    def acquire(self, action: Acquire, name: str, trace: str, abort: threading.Event) -> Acquired:
        """Acquire into a file whose stem is ``name``.

        Without a beam there is nothing to acquire: blanked at the start or meanwhile, it ends as an error.

        Raises
        ------
        Aborted
            ``abort`` was set; a scan that is written row by row stays cut, any other leaves nothing.
        InstrumentError
            It can't be made, the beam is blanked, the name is taken, or the disk refuses.
        """
        if not _NAME.fullmatch(name):
            raise InstrumentError(f"an acquisition can't be called {name!r:.80}")
        try:
            made = plan(action, self._parameters)
        except ValueError as error:
            raise InstrumentError(str(error)) from error
        self._check(abort)
        path = self._folder / f"{name}{SUFFIXES[made.form]}"
        data = made.dataset(name, trace, self._column.state.controls)
        try:
            with writing(path, made.form, data, grows=self._parameters.writing == "rows") as file:
                self._expose(made, file, abort)
        except OSError as error:
            raise InstrumentError(f"{path.name} can't be written: {error.strerror or error}") from error
        acquired = made.acquired(name, path.name)
        self._column.completed(made.frame_s * made.exposures, acquired)
        return acquired

    def made(self, name: str) -> Acquired | None:
        """The newest acquisition, if it has this name: it is remembered only once it is whole."""
        newest = self._column.state.newest
        return newest if newest is not None and newest.name == name else None

    def _expose(self, made: Plan, file: File, abort: threading.Event) -> None:
        began = time.monotonic()
        seed = (self._parameters.seed, 3, self._column.state.completed)
        counting = Counting(self._parameters.dtype, seed if self._parameters.noise else None)
        controls, hidden = self._column.state.controls, self._column.state.hidden
        true = Aberrations(**{name: controls[name] + hidden[name] for name in ABERRATIONS})
        exposed = 0
        for block, exposures in expected(made, self._parameters, self._specimen, true, self._specimen_at):
            self._check(abort)
            counts = counting.count(block)
            exposed += exposures
            wait = began + self._parameters.time_scale * made.frame_s * exposed - time.monotonic()
            if wait > 0:
                abort.wait(wait)
            self._check(abort)
            file.append(counts)

    def _check(self, abort: threading.Event) -> None:
        if abort.is_set() or (self.blanked() and abort.wait(ABORT_GRACE_S)):
            raise Aborted("the acquisition was ended early")
        if self.blanked():
            raise InstrumentError("the beam is blanked: nothing reaches the specimen")

    def _specimen_at(self, exposed_s: float) -> tuple[float, float]:
        """How far stage and drift have moved the specimen, nm, after so much exposure of this acquisition."""
        state = self._column.state
        since_s = state.exposed_s + exposed_s
        if self._parameters.clock == "wall":
            since_s = (time.time_ns() - state.born_ns) * 1e-9
        vy, vx = self._parameters.drift_nm_per_s
        return state.controls["stage_y_nm"] + vy * since_s, state.controls["stage_x_nm"] + vx * since_s
