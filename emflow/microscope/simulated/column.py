"""What a column keeps when its computer restarts: ``column.json``."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from emflow.microscope.protocol import Acquired, InstrumentError
from emflow.microscope.simulated.parameters import ABERRATIONS, CONTROLS, RANGES_NM, Parameters
from mpi_kernels import jsonfile

FILE = "column.json"


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The column at one moment.

    Attributes
    ----------
    seed : int
        It was made from.
    hidden : dict
        Aberrations beside the controls, nm; a true aberration is control + hidden.
    controls : dict
        Values of all controls.
    completed : int
        Acquisitions made to their end; with the seed, the seed of the next one's noise.
    exposed_s : float
        Sum of their exposures.
    born_ns : int
        Wall clock when it was made; drift by wall time starts there.
    blanked : bool
        Whether the beam is off the specimen.
    newest : Acquired or None
        The last acquisition that was made to its end.
    """

    seed: int
    hidden: dict[str, float]
    controls: dict[str, float]
    completed: int
    exposed_s: float
    born_ns: int
    blanked: bool
    newest: Acquired | None = None
    v: Literal[1] = 1


class Column:
    """The state, kept in a file that is whole at any time; safe from several threads.

    Parameters
    ----------
    folder : Path
        Holds ``column.json``; a column that is there is taken over, with its controls and hidden aberrations.
    parameters : Parameters
        Of a new column.

    Raises
    ------
    ValueError
        The file is damaged, or of another column than the parameters say.
    """

    def __init__(self, folder: Path, parameters: Parameters) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._lock = threading.Lock()
        self._state = load(folder) if self._path.exists() else self._new(parameters)
        other = {n: v for n, v in parameters.hidden.given().items() if v != self._state.hidden[n]}
        if self._state.seed != parameters.seed or other:
            raise ValueError(
                f"{self._path} is the column of seed {self._state.seed}, and seed or hidden aberrations of the "
                "parameters are others: name another folder for the state, or remove the file to start anew"
            )

    def _new(self, parameters: Parameters) -> State:
        state = State(
            seed=parameters.seed,
            hidden=draw(parameters),
            controls=dict.fromkeys(CONTROLS, 0.0),
            completed=0,
            exposed_s=0.0,
            born_ns=time.time_ns(),
            blanked=False,
        )
        self._write(state)
        return state

    @property
    def state(self) -> State:
        """The column now."""
        return self._state

    def set(self, values: Mapping[str, float]) -> None:
        """Bring controls to values, all of them or none.

        Raises
        ------
        InstrumentError
            A control is unknown, or a value out of its reach.
        """
        for name, value in values.items():
            if name not in RANGES_NM:
                raise InstrumentError(f"no control is called {name!r:.80}; there are {', '.join(CONTROLS)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InstrumentError(f"{name} can't be {value!r:.80}")
            if abs(value) > RANGES_NM[name]:
                raise InstrumentError(
                    f"{name} can't be {value:g}: it reaches from {-RANGES_NM[name]:g} to its negative"
                )
        plain = {name: float(value) for name, value in values.items()}
        with self._lock:
            self._replace(controls=self._state.controls | plain)

    def blank(self, blanked: bool) -> None:
        """Take the beam off the specimen, or put it back; it is done even if it can't be remembered."""
        with self._lock:
            if blanked != self._state.blanked:
                self._state = msgspec.structs.replace(self._state, blanked=blanked)
                self._replace()

    def completed(self, exposure_s: float, made: Acquired) -> None:
        """Count an acquisition that was made to its end."""
        with self._lock:
            exposed_s = self._state.exposed_s + exposure_s
            self._replace(completed=self._state.completed + 1, exposed_s=exposed_s, newest=made)

    def _replace(self, **changes: Any) -> None:
        state = msgspec.structs.replace(self._state, **changes)
        try:
            self._write(state)
        except OSError as error:
            raise InstrumentError(f"{self._path.name} can't be written: {error.strerror or error}") from error
        self._state = state

    def _write(self, state: State) -> None:
        """Replace the file; whoever is killed in between leaves the old or the new one."""
        jsonfile.replace(self._path, msgspec.json.encode(state))


def load(folder: Path) -> State:
    """The column that a folder holds.

    Raises
    ------
    ValueError
        The file is damaged, or of another version.
    """
    try:
        state = msgspec.json.decode((folder / FILE).read_bytes(), type=State, strict=True)
    except msgspec.DecodeError as error:
        raise ValueError(f"{folder / FILE} is no state of a column: {error}") from error
    if set(state.hidden) != set(ABERRATIONS) or set(state.controls) != set(CONTROLS):
        raise ValueError(f"{folder / FILE} is no state of a column: its hidden values or controls are others")
    return state


def draw(parameters: Parameters) -> dict[str, float]:
    """Hidden aberrations, nm: those given, the others from the seed.

    ``100 <= |C10| <= 600``; C12 has any direction and ``0 < |C12| <= 150``.
    """
    random = np.random.default_rng([parameters.seed, 2])
    defocus = random.uniform(100.0, 600.0) * random.choice((-1.0, 1.0))
    # 1 - random() is never 0
    astigmatism, turn = 150.0 * (1.0 - random.random()), random.uniform(0.0, 2 * math.pi)
    drawn = (defocus, astigmatism * math.cos(turn), astigmatism * math.sin(turn))
    return dict(zip(ABERRATIONS, map(float, drawn), strict=True)) | parameters.hidden.given()
