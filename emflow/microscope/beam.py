"""The beam: blanked where STOP or a lost lease demands it, opened by an acquisition only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from emflow.microscope.protocol import Microscope

_log = logging.getLogger("emflow.microscope")


class Beam:
    """Brings the beam to what is wanted; safe from any thread.

    Parameters
    ----------
    backend : Microscope
        Whose beam it is.
    wanted : callable
        ``wanted(opening)`` says whether it is to be blanked now; None: leave it as it is.
    """

    def __init__(self, backend: Microscope, wanted: Callable[[bool], bool | None]) -> None:
        self.trouble = ""
        self._backend, self._wanted = backend, wanted
        self._lock = threading.Lock()

    def settle(self, *, opening: bool = False) -> None:
        """Blank or open it as is wanted now; ``opening``: for an acquisition that begins.

        Whoever comes last asks last what is wanted, so that no opening can follow a STOP.
        """
        with self._lock:
            blank = self._wanted(opening)
            if blank is None:
                return
            try:
                if self._backend.blanked() != blank:
                    self._backend.blank(blank)
                self.trouble = ""
            except Exception:  # noqa: BLE001 - a backend's failure must not end the thread that stops it
                self.trouble = f"the beam can't be {'blanked' if blank else 'opened'}: the server's log says why"
                _log.exception("%s", self.trouble)
