"""sbatch's flags as fields of pyslurm's ``JobSubmitDescription``; a flag that has none is refused by name.

pyslurm reads no flags, and its fields have defaults of their own where sbatch has none.  Each field here was compared
with what sbatch makes of the same flag (``scontrol show job``), with pyslurm 25.11.2.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from emflow.errors import SubmitError, printable

_UNITS_MIB = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
_SIGNAL = re.compile(r"(?:(?P<to>[BR]+):)?(?P<signal>[A-Z0-9]+)(?:@(?P<time>[0-9]+))?")
_NODES = re.compile(r"[1-9][0-9]*(-[1-9][0-9]*)?")


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"yes or no is expected, not {text!r}")
    return text == "yes"


def _mib(text: str) -> int:
    """Mebibytes, as sbatch counts without a unit.  sbatch's 0, all of a node, gets lost in pyslurm."""
    found = re.fullmatch(r"([1-9][0-9]*)([KMGT]?)B?", text.upper())
    if found is None:
        raise ValueError(f"a size such as 4000M is expected, not {text!r}")
    return max(1, round(int(found[1]) * _UNITS_MIB[found[2] or "M"]))


def _time(text: str) -> object:
    """Minutes as a number, which pyslurm can't read from text; everything else as Slurm reads it."""
    return int(text) if text.isdigit() else text


def _nodes(text: str) -> str:
    if not _NODES.fullmatch(text):
        raise ValueError(f"a number of nodes such as 2 or 1-4 is expected, not {text!r}")
    return text


def _signal(text: str) -> dict[str, object]:
    """``[B:]USR1@60``; without a time it is the 60 s of sbatch."""
    found = _SIGNAL.fullmatch(text)
    if found is None:
        raise ValueError(f"a signal such as B:USR1@60 is expected, not {text!r}")
    name = found["signal"].removeprefix("SIG")
    number = int(name) if name.isdigit() else int(signal.Signals[f"SIG{name}"])
    said: dict[str, object] = {"signal": number, "time": int(found["time"] or 60)}
    for letter, key in (("B", "batch_only"), ("R", "allow_reservation_overlap")):
        if letter in (found["to"] or ""):
            said[key] = True
    return said


def _cards(text: str) -> dict[str, int]:
    """``2`` or ``a100:2``, as a generic resource of a node."""
    kind, _, count = text.rpartition(":")
    return {f"gpu:{kind}" if kind else "gpu": int(count)}


FIELDS: Mapping[str, tuple[str, Callable[[str], object]]] = {
    # what emflow asks for
    "job-name": ("name", str),
    "comment": ("comment", str),
    "chdir": ("working_directory", str),
    "output": ("standard_output", str),
    "error": ("standard_error", str),
    "input": ("standard_in", str),
    "open-mode": ("log_files_open_mode", str),
    "kill-on-invalid-dep": ("kill_on_invalid_dependency", _yes),
    "account": ("account", str),
    "partition": ("partitions", str),
    "qos": ("qos", str),
    "constraint": ("constraints", str),
    "reservation": ("reservations", str),
    "nodes": ("nodes", _nodes),
    "ntasks": ("ntasks", int),
    "cpus-per-task": ("cpus_per_task", int),
    "gpus-per-task": ("gpus_per_task", int),
    "mem": ("memory_per_node", _mib),
    "time": ("time_limit", _time),
    "signal": ("signal", _signal),
    # what a site may want beside it
    "begin": ("begin_time", str),
    "core-spec": ("cores_reserved_for_system", int),
    "dependency": ("dependencies", str),
    "exclude": ("excluded_nodes", str),
    "gpus-per-node": ("gres_per_node", _cards),
    "licenses": ("licenses", str),
    "mem-per-cpu": ("memory_per_cpu", _mib),
    "network": ("network", str),
    "nice": ("nice", int),
    "nodelist": ("required_nodes", str),
    "ntasks-per-node": ("ntasks_per_node", int),
    "threads-per-core": ("threads_per_core", int),
    "wckey": ("wckey", str),
}
"""Field, and how its value is made from a flag's text."""

SWITCHES: Mapping[str, tuple[str, object]] = {
    "no-requeue": ("is_requeueable", False),
    "requeue": ("is_requeueable", True),
    "exclusive": ("resource_sharing", "exclusive"),
    "contiguous": ("requires_contiguous_nodes", True),
}
"""Flags without a value."""

NO_VAL = 0xFFFFFFFE
"""What Slurm takes for "not said".  Source: slurm.h."""

DEFAULTS: Mapping[str, object] = {
    # pyslurm's own: one node, and a profile of everything
    "nodes": f"{NO_VAL}-{NO_VAL}",
    "profile_types": "none",
}
"""What has to be said so that nothing is asked for, as with sbatch."""

VARIABLES: Mapping[str, str] = {
    "cpus_per_task": "SLURM_CPUS_PER_TASK",
    "gpus_per_task": "SLURM_GPUS_PER_TASK",
    "ntasks_per_node": "SLURM_NTASKS_PER_NODE",
    "threads_per_core": "SLURM_THREADS_PER_CORE",
}
"""Variables that sbatch itself, not the node, gives to a job; srun reads some of them."""

_NO_MATTER = ("parsable", "quiet", "export=ALL")
"""How sbatch answers, and what pyslurm does in any case: the job gets the whole environment that it is given."""


def fields(flags: Iterable[str]) -> dict[str, object]:
    """Fields for the flags of a command line; of a flag that stands twice the last counts, as for sbatch.

    Parameters
    ----------
    flags : iterable of str
        Each ``--name=value`` or ``--name``.

    Raises
    ------
    SubmitError
        A flag that has no field, or a value that does not fit; the text names it.
    """
    found: dict[str, object] = {}
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if flag.removeprefix("--") in _NO_MATTER:
            continue
        if flag.startswith("--") and equals and name in FIELDS:
            field, convert = FIELDS[name]
            try:
                found[field] = convert(value)
            except (ValueError, KeyError) as error:
                raise SubmitError(
                    f"pyslurm can't be asked for {printable(flag)}: {error}", next_step=_ELSE.format(name=f"--{name}")
                ) from error
        elif flag.startswith("--") and not equals and name in SWITCHES:
            field, switched = SWITCHES[name]
            found[field] = switched
        else:
            what = printable(flag.partition("=")[0])
            raise SubmitError(f"pyslurm has nothing for sbatch's {printable(flag)}", next_step=_ELSE.format(name=what))
    return {**DEFAULTS, **found}


def variables(found: Mapping[str, object]) -> dict[str, str]:
    """What sbatch would tell a job of these fields."""
    return {variable: str(found[field]) for field, variable in VARIABLES.items() if field in found}


_ELSE = 'Take {name} out of flags of [slurm], or set [scheduler] use = "slurm"'


def directives(script: Path) -> tuple[str, ...]:
    """The flags in a job script's own ``#SBATCH`` lines, which sbatch reads and pyslurm does not."""
    found: list[str] = []
    for line in script.read_text("utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            found += line.split()[1:]
    return tuple(found)
