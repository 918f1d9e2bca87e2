"""The tables of the configuration as records, with their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

DAY_S = 86400.0
OWN_FOLDERS = ("state", "runs", "results", "experiments")
"""Folders of the service, in `ServiceSettings`."""

# The upper bound also refuses inf, which TOML can write; nan fails every comparison.
Seconds = Annotated[float, msgspec.Meta(gt=0, le=30 * DAY_S)]


class Bytes(int):
    """A number of bytes; in the file a whole number or text such as ``"1 GiB"``."""


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[service]``: the service's own folders; relative ones belong to the folder of the file."""

    state: Path = Path("state")
    runs: Path = Path("runs")
    results: Path = Path("results")
    experiments: Path = Path("experiments")


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """``[[watch]]``: one share whose new files become acquisitions.

    ``match`` empty means the suffixes of all formats; ``ignore`` wins over ``match``.  ``share`` is the folder's name
    unless it is given, and is part of every acquisition's id.
    """

    root: Path
    share: str = ""
    match: tuple[str, ...] = ()
    ignore: tuple[str, ...] = (".*", "*.tmp", "*.part")
    recipe: str = "default"


class ScanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[scan]``: how often folders are read, and how long a file must rest before it is believed."""

    active_s: Seconds = 0.5
    recent_s: Seconds = 3.0
    whole_s: Seconds = 15.0
    settle_s: Seconds = 1.0
    stable_s: Seconds = 5.0
    stall_s: Seconds = 60.0
    quarantine_s: Seconds = 3600.0
    hints: Literal["auto", "inotify", "none"] = "auto"


class TransferSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[transfer]``: the verified copy."""

    stage: Literal["copy", "none"] = "copy"
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    min_free: Bytes = Bytes(1 << 30)


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[scheduler]``: who runs the jobs, and how much one may use."""

    use: str = "local"
    ranks: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 2
    max_active: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    time_limit_s: Annotated[int, msgspec.Meta(ge=1, le=int(30 * DAY_S))] = 3600
    attempts: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    poll_s: Seconds = 0.2


class KernelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[kernels]``: how jobs compute; no result depends on it."""

    device: Literal["cpu", "gpu"] = "cpu"
    kernel: Literal["auto", "numpy", "portable", "avx2", "avx512"] = "auto"
    reading: Literal["auto", "mmap", "read", "direct", "source"] = "auto"
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0


class MicroscopeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[microscope]``: where its server listens, and the share that it writes to (the first one unless given)."""

    address: str = "127.0.0.1:7763"
    share: str = ""
    patience_s: Seconds = 60.0


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[agent]``: how far the agent may go; 0 means without bound."""

    mode: Literal["observe", "propose", "approve", "auto"] = "propose"
    address: str = "127.0.0.1:0"
    max_acquisitions: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 20
    max_dose_e: Annotated[float, msgspec.Meta(ge=0, le=1e18)] = 0.0
    max_time_s: Annotated[float, msgspec.Meta(ge=0, le=30 * DAY_S)] = 0.0
    no_improvement: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 4
    result_timeout_s: Seconds = 600.0


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[log]``: what is told on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    json: bool = False


class File(msgspec.Struct, frozen=True, kw_only=True):
    """The tables that ``emflow.toml`` may have."""

    watch: tuple[Watch, ...]
    service: ServiceSettings = ServiceSettings()
    scan: ScanSettings = ScanSettings()
    transfer: TransferSettings = TransferSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    kernels: KernelSettings = KernelSettings()
    microscope: MicroscopeSettings = MicroscopeSettings()
    agent: AgentSettings = AgentSettings()
    log: LogSettings = LogSettings()


class Config(File, frozen=True, kw_only=True):
    """All of ``emflow.toml``, checked, with absolute paths; ``folder`` is where the file lies."""

    folder: Path
