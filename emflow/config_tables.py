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
    """``[transfer]``: the verified copy; ``live``: begun, and reduced, while the file is still being written."""

    stage: Literal["copy", "none"] = "copy"
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    min_free: Bytes = Bytes(1 << 30)
    live: bool = False


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[scheduler]``: who runs the jobs, and how much one may use.

    A job that is said to run and shows no sign of life for ``silent_s`` is ended, and followed by the next attempt.
    """

    use: str = "local"
    ranks: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 2
    max_active: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    time_limit_s: Annotated[int, msgspec.Meta(ge=1, le=int(30 * DAY_S))] = 3600
    attempts: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    poll_s: Seconds = 0.2
    silent_s: Seconds = 600.0


class SiteKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What jobs ask Slurm for: the keys that a site's profile and ``[slurm]`` have in common.

    ``setup`` is a bash file that the job scripts source before anything else; ``container`` an Apptainer image that
    holds mpi_kernels; ``python`` the interpreter on the nodes; ``memory`` is for each node.
    """

    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    nodes: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    cpus_per_rank: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    gpus_per_rank: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    memory: Bytes = Bytes(0)
    mpi: str = ""
    python: str = ""
    setup: str = ""
    container: str = ""
    flags: tuple[str, ...] = ()


class SlurmSettings(SiteKeys, frozen=True, kw_only=True):
    """``[slurm]``.  What is empty or 0 is left to the site's profile, and then to Slurm.

    ``site`` is a profile that ships with emflow, or the path of a TOML file with `SiteKeys`; ``warn_s`` how long before
    its time is up a job is told, so that it can leave what it has.
    """

    site: str = "generic"
    warn_s: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 60


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[pool]``: ranks that are kept warm and take one job after the other.

    ``launcher`` is what starts them: a Slurm job, or mpiexec over ``hosts`` (this machine, if there are none).
    ``relay_s`` before its time is up a pool's successor is asked for.  ``nap_ms`` is how long an idle rank sleeps
    between two looks: shorter is sooner, and costs more of a core.  ``reach`` says how tasks get to it: over TCP, or as
    files in a spool folder; ``auto`` takes files where TCP does not get through.
    """

    launcher: Literal["slurm", "mpiexec"] = "slurm"
    folder: Path = Path("pool")
    count: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    hosts: tuple[str, ...] = ()
    walltime_s: Annotated[int, msgspec.Meta(ge=60, le=int(30 * DAY_S))] = 3600
    relay_s: Seconds = 300.0
    nap_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.5
    reach: Literal["auto", "tcp", "spool"] = "auto"


class CapSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[caps]``: how much of an allocation may be spent; 0 means without bound.

    From ``degrade_at`` of a cap on, jobs take the recipe ``degraded`` (if there is one); at the cap they wait, and
    nothing is dropped.  With more than ``backlog`` acquisitions waiting, the agent is asked to hold its next one.
    """

    node_hours_per_day: Annotated[float, msgspec.Meta(ge=0, le=1e7)] = 0.0
    node_hours_per_experiment: Annotated[float, msgspec.Meta(ge=0, le=1e7)] = 0.0
    degrade_at: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    degraded: str = ""
    backlog: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


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
    slurm: SlurmSettings = SlurmSettings()
    pool: PoolSettings = PoolSettings()
    caps: CapSettings = CapSettings()
    kernels: KernelSettings = KernelSettings()
    microscope: MicroscopeSettings = MicroscopeSettings()
    agent: AgentSettings = AgentSettings()
    log: LogSettings = LogSettings()


class Config(File, frozen=True, kw_only=True):
    """All of ``emflow.toml``, checked, with absolute paths; ``folder`` is where the file lies."""

    folder: Path
