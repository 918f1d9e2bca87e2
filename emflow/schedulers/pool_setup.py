"""Pools as the configuration asks for them: made, looked at by ``emflow check``, and rehearsed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator

from emflow.config import Config
from emflow.errors import EmflowError, NotAllowed, printable
from emflow.records import Resources
from emflow.schedulers import site, slurm_commands
from emflow.schedulers.file_system import file_system, is_local
from emflow.schedulers.local import find_launcher
from emflow.schedulers.pool_folder import PoolFolder
from emflow.schedulers.pool_launch import SlurmLauncher, hosts_of, launchers, starter_of
from emflow.schedulers.pool_relay import STALE_S, Relay
from emflow.schedulers.pool_secret import SECRET_FILE, make_secret
from emflow.schedulers.pool_signs import PREFIX, Signs
from emflow.schedulers.protocol import Finding, Rehearsal
from mpi_kernels.events import host_name
from mpi_kernels.pool.records import PoolSpec

LOCK_FILE = "pools.lock"
"""In the state folder, which is on a local disk: locks on shares can't be relied on."""

WARNED_PART = 0.2
"""Of its walltime, at most: so long before its end a pool takes nothing new."""

END_S = 60.0
"""How long the end of a pool may take after it was told to: Slurm kills after 30 s by default."""

_LOOK_S = 0.3
_EXAMPLE = "20240501T120000-00"
_START = 'emflow pool start starts one now; a service with [scheduler] use = "pool" does so by itself'


def relay_of(config: Config, folder: PoolFolder, *, stale_s: float = STALE_S) -> Relay:
    """The relay that the configuration asks for; nothing is made, started or asked yet."""
    pool = config.pool
    return Relay(
        Signs(folder, launchers(config), pool.launcher),
        spec_of(config),
        count=pool.count,
        relay_s=pool.relay_s,
        lock=config.service.state / LOCK_FILE,
        stale_s=stale_s,
    )


def end_pools(config: Config, seconds: float = END_S) -> bool:
    """End all pools at once, with what they do, and start none until `PoolFolder.hold` is taken back.

    Returns
    -------
    bool
        Whether it is certain that nothing of them runs any more.
    """
    relay, until = relay_of(config, PoolFolder(config.pool.folder)), time.monotonic() + seconds
    relay.folder.hold(True)
    while True:
        with relay.locked():
            left = [pool for pool in relay.look() if not relay.end(pool.name, "stopped by a person")]
        if not left or time.monotonic() > until:
            return not left
        time.sleep(_LOOK_S)


def spec_of(config: Config) -> PoolSpec:
    """``pool.json`` of a pool, but for its name."""
    pool = config.pool
    return PoolSpec(
        name=_EXAMPLE,
        runs=str(config.service.runs),
        ranks=config.scheduler.ranks,
        secret=str(pool.folder / SECRET_FILE),
        walltime_s=float(pool.walltime_s),
        warn_s=min(float(config.slurm.warn_s), WARNED_PART * pool.walltime_s),
        nap_ms=float(pool.nap_ms),
        reach=pool.reach,
        gateway=host_name(),
        device=config.kernels.device,
    )


def rehearse_pool(config: Config) -> Rehearsal:
    """What a pool would be started with, and what Slurm says to it without running anything."""
    folder = config.pool.folder / _EXAMPLE
    if config.pool.launcher == "mpiexec":
        rehearsed = starter_of(config).rehearse(
            Resources(ranks=config.scheduler.ranks, time_limit_s=config.pool.walltime_s)
        )
        command = (*rehearsed.command[:-1], str(folder))
        said = "jobs are names that are sent to it"
        return Rehearsal(command=command, environment=rehearsed.environment, script=rehearsed.script, said=said)
    request = site.pool_request(config, PREFIX + _EXAMPLE)
    flags, environment = SlurmLauncher.flags(request, folder), SlurmLauncher.environment(request)
    trial = slurm_commands.submission(flags, request.script, folder, "--test-only")
    try:
        answer = slurm_commands.run(trial, env=environment, timeout_s=slurm_commands.SUBMIT_S)
        ok, said = answer.code == 0, answer.said
    except EmflowError as error:
        ok, said = False, str(error)
    return Rehearsal(
        command=slurm_commands.submission(flags, request.script, folder),
        environment=request.environment,
        script=request.script.read_text("utf-8"),
        said=said,
        ok=ok,
    )


def check_pools(config: Config) -> list[Finding]:
    """What pools need: the folder, the secret, what starts them; and the pools that are up."""
    return list(_check(config))


def _check(config: Config) -> Iterator[Finding]:
    folder = PoolFolder(config.pool.folder)
    yield _place(config)
    try:
        secret = make_secret(folder.root)
        yield Finding(part="pool secret", ok=True, found=f"{printable(str(secret))}, for this user only")
    except (EmflowError, OSError) as error:
        fix = f"let only the service's user read {printable(str(folder.root / SECRET_FILE))}"
        yield Finding(part="pool secret", ok=False, found=printable(str(error)), fix=fix)
        return
    yield _starter(config)
    try:
        up = relay_of(config, folder).glance()
    except (EmflowError, OSError) as error:
        yield Finding(part="pools", ok=False, found=printable(str(error)), fix="emflow pool status")
        return
    told = "; ".join(f"{pool.name} {pool.standing} on {pool.host}" for pool in up)
    held = " They are stopped (emflow pool stop)." if folder.held else ""
    # none is no fault: jobs go another way meanwhile
    yield Finding(part="pools", ok=True, found=told or f"none is up.{held} {_START}")


def _place(config: Config) -> Finding:
    """Whether the nodes can see the pool folder, as far as this machine can tell."""
    root, part = config.pool.folder, "pool folder"
    where = printable(str(root))
    try:
        relay_of(config, PoolFolder(root)).own()
        kind = file_system(root)
    except NotAllowed as error:
        return Finding(part=part, ok=False, found=error.message, fix=error.next_step)
    except OSError as error:
        fix = f"let the service's user write to {where}, or correct folder in [pool]"
        return Finding(part=part, ok=False, found=f"{where}: {error.strerror}", fix=fix)
    elsewhere = config.pool.launcher == "slurm" or bool(config.pool.hosts)
    if os.path.realpath(root).startswith("/proc") or not os.access(root, os.W_OK):
        return Finding(part=part, ok=False, found=f"{where} can't be written to", fix="correct folder in [pool]")
    warned = f" ({kind}, a file system of this machine: the nodes must see it under the same path)"
    return Finding(part=part, ok=True, found=where + (warned if elsewhere and is_local(root) else f" ({kind})"))


def _starter(config: Config) -> Finding:
    part = "pool launcher"
    if config.pool.launcher == "slurm":
        found = shutil.which("sbatch")
        fix = "" if found else 'install Slurm\'s client commands here, or set [pool] launcher = "mpiexec"'
        return Finding(part=part, ok=found is not None, found=found or "no sbatch", fix=fix)
    try:
        hosts = hosts_of(config)
    except EmflowError as error:
        return Finding(part=part, ok=False, found=error.message, fix=error.next_step)
    launcher = find_launcher(config.slurm.python or sys.executable)
    needed = config.scheduler.ranks > 1 or bool(hosts)
    told = f"{launcher or 'no mpiexec'}, {config.scheduler.ranks} ranks on {', '.join(hosts) or 'this machine'}"
    fix = "" if launcher or not needed else "pip install mpich, or set [scheduler] ranks = 1"
    return Finding(part=part, ok=not fix, found=printable(told), fix=fix)
