"""What ``emflow check`` looks at: each part is tried for real, and what is missing comes with its cure."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from emflow import __version__
from emflow.config import OWN_FOLDERS, Config
from emflow.errors import EmflowError, Unavailable, printable
from emflow.microscope.client import MicroscopeClient
from emflow.recipes import load_recipe
from emflow.registry import Group, load, names
from emflow.runs import holder
from emflow.schedulers.protocol import Finding
from emflow.transfer import free_bytes
from emflow.watch.hints import choose

_NUMBERS = ("numpy", "h5py", "hdf5plugin", "isal", "mpi4py", "mpich")
PACKAGES = (*_NUMBERS, "msgspec", "xxhash", "inotify-simple", "Pyro5", "click", "rich")
EXTRAS = {
    "matplotlib": "notebook",
    "cryptography": "microscope",
    "pyslurm": "slurm",
    "cupy-cuda12x": "gpu",
    "numcodecs": "formats",
    "rosettasciio": "formats",
    "tifffile": "formats",
}
"""Optional packages and the extra that brings each."""


SELFTEST_S = 60.0


def findings(config: Config) -> Iterator[Finding]:
    """Look at everything, the cheapest first."""
    yield Finding(part="emflow", ok=True, found=f"{__version__}, Python {platform.python_version()}, {sys.executable}")
    yield from _packages()
    yield from _plugins()
    yield _kernels()
    for name in OWN_FOLDERS:
        yield _folder(name, getattr(config.service, name))
    yield _space(config)
    for watch in config.watch:
        yield from _share(watch, config)
    yield _service(config)
    yield _microscope(config)
    scheduler: Any = load("schedulers", config.scheduler.use).from_config(config)
    try:
        yield from scheduler.check()
    finally:
        scheduler.close()
    if os.geteuid() == 0:
        yield Finding(
            part="user", ok=True, found="root: it works, but a service user without write right on the share is safer"
        )


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        found = _version(name)
        fix = "" if found else "pip install emflow again in this environment"
        yield Finding(part=f"package {name}", ok=found is not None, found=found or "missing", fix=fix)
    for name, extra in EXTRAS.items():
        found = _version(name) or f"not installed (optional: pip install 'emflow[{extra}]')"
        yield Finding(part=f"package {name}", ok=True, found=found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plugins() -> Iterator[Finding]:
    groups: tuple[Group, ...] = get_args(Group)
    for group in groups:
        bad = []
        for name in names(group):
            try:
                load(group, name)
            except EmflowError as error:
                bad.append(str(error))
        yield Finding(
            part=group,
            ok=not bad and bool(names(group)),
            found=", ".join(names(group)) or "none",
            fix="; ".join(bad) or ("" if names(group) else "pip install emflow again: its entry points are missing"),
        )


def _kernels() -> Finding:
    """Known frames on every path of the kernels, in a process of its own."""
    command = [sys.executable, "-m", "mpi_kernels", "--selftest", "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SELFTEST_S, check=False)
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Finding(
            part="kernels", ok=False, found=printable(str(error))[:300], fix="python -m mpi_kernels --selftest"
        )
    wrong = [way for way in found["paths"] if way["wrong"]]
    kernels = sorted({way["used"].get("kernel", "") for way in found["paths"]} - {""})
    told = f"{', '.join(kernels)}: {len(found['paths']) - len(wrong)} of {len(found['paths'])} paths give known answers"
    if wrong:
        fix = f"report it, with this machine's processor: {wrong[0]['path']}: {wrong[0]['wrong']}"
        return Finding(part="kernels", ok=False, found=told, fix=fix)
    slow = kernels == ["numpy"]
    told += "; nothing is compiled, so it is slow: install a C compiler, then emflow again" if slow else ""
    return Finding(part="kernels", ok=True, found=told)


def _folder(name: str, path: Path) -> Finding:
    """Make the folder and a file in it, as the service would."""
    part, where = f"folder {name}", printable(str(path))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        return Finding(
            part=part, ok=False, found=f"{where}: {error.strerror}", fix=f"let the service's user write to {where}"
        )
    if name in ("state", "runs") and path.stat().st_mode & 0o002:  # a job.json names the code that is run
        found = f"{where} can be written by everybody, who could have the service run what they like"
        return Finding(part=part, ok=False, found=found, fix=f"chmod o-w {where}")
    return Finding(part=part, ok=True, found=where)


def _space(config: Config) -> Finding:
    try:
        free = free_bytes(config.service.runs)
    except (EmflowError, OSError) as error:
        return Finding(
            part="room", ok=False, found=printable(str(error)), fix="make the folder, or correct runs in [service]"
        )
    kept = config.transfer.min_free
    return Finding(
        part="room",
        ok=free > kept,
        found=f"{free / 2**30:.1f} GiB free, {kept / 2**30:.1f} GiB kept free",
        fix="" if free > kept else "make room, or lower [transfer] min_free",
    )


def _share(watch: Any, config: Config) -> Iterator[Finding]:
    part, root = f"share {watch.share}", printable(str(watch.root))
    try:
        entries = sum(1 for _ in os.scandir(watch.root))
    except OSError as error:
        yield Finding(
            part=part, ok=False, found=f"{root}: {error.strerror}", fix="mount it, or correct root in [[watch]]"
        )
        return
    writable = ", writable (a read-only mount is safer)" if os.access(watch.root, os.W_OK) else ", read-only"
    yield Finding(part=part, ok=True, found=f"{root}: {entries} entries{writable}")
    try:
        hints = choose(watch.root, config.scan.hints)
        hints.arm()
        told = "inotify" if hints.live else hints.degraded or "none: files are found by scans only"
        hints.close()
        yield Finding(part=f"{part} hints", ok=True, found=told)
    except EmflowError as error:
        yield Finding(part=f"{part} hints", ok=False, found=error.message, fix=error.next_step)
    try:
        recipe = load_recipe(watch.recipe, relative_to=config.folder)
        yield Finding(
            part=f"{part} recipe", ok=True, found=f"{recipe.name}: {', '.join(r.name for r in recipe.reductions)}"
        )
    except EmflowError as error:
        fix = error.next_step or "correct recipe in [[watch]], or the file that it names"
        yield Finding(part=f"{part} recipe", ok=False, found=error.message, fix=fix)


def _microscope(config: Config) -> Finding:
    """Ask the microscope's server; that there is none is no fault, since only steering needs one."""
    address = config.microscope.address
    try:
        with MicroscopeClient(address, role="viewer", name="emflow check", patience_s=0.0, timeout_s=2.0) as client:
            status = client.status()
    except EmflowError as error:
        missing = isinstance(error, Unavailable)
        told = f"no answer at {address} (only emflow agent needs it)" if missing else error.message
        return Finding(part="microscope", ok=missing, found=told, fix=error.next_step if not missing else "")
    return Finding(part="microscope", ok=True, found=f"{status.backend} at {address}: {status.mode.value}")


def _service(config: Config) -> Finding:
    pid = holder(config.service.state)
    return Finding(
        part="service", ok=True, found=f"running, pid {pid}" if pid else "not running (emflow run starts it)"
    )
