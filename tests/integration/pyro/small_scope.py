"""A small microscope that writes real files, can be slow, fail and be aborted, and notes all that it was made to do."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from emflow.microscope.protocol import Aborted, Acquire, Acquired, Camera, InstrumentError, Scan


class SmallScope:
    """Its controls survive its process, as those of an instrument do; ``done.log`` tells every action begun."""

    def __init__(self, folder: Path, state: Path, parameters: Mapping[str, Any]) -> None:
        known = {"seconds": 0.0, "refuse": "", "misplace": "", "hang": False, "nan": False}
        if unknown := set(parameters) - set(known):
            raise ValueError(f"unknown {sorted(unknown)}; known: {sorted(known)}")
        self.folder, self.state = folder, state
        self.parameters = known | dict(parameters)
        self._lock = threading.Lock()
        self._controls = {"C10_nm": 0.0, "C12a_nm": 0.0, "stage_x_nm": 0.0}
        if (state / "controls.json").exists():
            self._controls = json.loads((state / "controls.json").read_text())
        self._blanked = False
        self._note("start")

    def _note(self, text: str) -> None:
        fd = os.open(self.state / "done.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(fd, f"{text}\n".encode())
        os.close(fd)

    def read(self) -> Mapping[str, float]:
        with self._lock:
            return dict(self._controls) | ({"C12a_nm": float("nan")} if self.parameters["nan"] else {})

    def set(self, values: Mapping[str, float]) -> None:
        if self.parameters["refuse"] == "set":
            raise InstrumentError("the lens is cold")
        self._note(f"set {json.dumps(dict(values), sort_keys=True)}")
        with self._lock:
            self._controls |= values
        temporary = self.state / "controls.tmp"
        temporary.write_text(json.dumps(self._controls))
        temporary.replace(self.state / "controls.json")

    def dose_e(self, action: Acquire) -> float:
        if self.parameters["refuse"] == "dose":
            raise ValueError("frames: too many for this camera")
        return 1000.0 * (action.frames if isinstance(action, Camera) else action.shape[0] * action.shape[1])

    def acquire(self, action: Acquire, name: str, trace: str, abort: threading.Event) -> Acquired:
        self._note(f"acquire {name}")
        if self.parameters["refuse"] == "acquire":
            raise InstrumentError("the camera is warm")
        if self.parameters["refuse"] == "bug":
            raise RuntimeError("/a/secret/path")
        if self._blanked:
            raise InstrumentError("the beam is blanked")
        until = time.monotonic() + float(self.parameters["seconds"])
        while time.monotonic() < until or self.parameters["hang"]:
            if abort.wait(0.01):
                raise Aborted
        kind, scan, det = "4d", tuple(getattr(action, "shape", ())), (2, 2)
        if isinstance(action, Camera):
            kind, scan = "stack", (action.frames,)
        elif isinstance(action, Scan):
            kind, scan, det = "image", (), tuple(action.shape)
        with (self.folder / f"{name}.npy").open("xb") as file:  # "x": made twice is an error
            np.save(file, np.ones((*scan, *det), np.uint16))
        self._note(f"made {name}")
        frames = int(np.prod(scan, dtype=int))
        path = self.parameters["misplace"] or f"{name}.npy"
        made = Acquired(
            name=name, path=path, kind=kind, scan_shape=scan, det_shape=det, frames=frames, dose_e=self.dose_e(action)
        )
        temporary = self.state / "newest.tmp"
        temporary.write_bytes(msgspec.json.encode(made))
        temporary.replace(self.state / "newest.json")
        return made

    def made(self, name: str) -> Acquired | None:
        path = self.state / "newest.json"
        newest = msgspec.json.decode(path.read_bytes(), type=Acquired) if path.exists() else None
        return newest if newest is not None and newest.name == name else None

    def blank(self, blanked: bool) -> None:
        self._blanked = blanked
        self._note("blank" if blanked else "open")

    def blanked(self) -> bool:
        return self._blanked

    def close(self) -> None:
        self._note("close")
