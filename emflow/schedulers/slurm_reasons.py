"""Why a job of Slurm waits, in plain words, and whether that can change without a person.

Source: ``job_reason_string`` (``job_state_reason.c``) of Slurm 22.05 to 26.05, and JOB REASON CODES in squeue(1).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import NamedTuple


class Outlook(enum.StrEnum):
    """How a wait ends; the words begin what people read."""

    TURN = "waits"  # by itself
    OTHERS = "waits for others"  # when other jobs, nodes or people let it; may take long
    NEVER = "waits for ever"  # only if somebody changes something
    UNKNOWN = "waits, and Slurm says"


class Wait(NamedTuple):
    """A reason: how it ends, what it means, and what to do about it."""

    outlook: Outlook
    why: str
    cure: str = ""


_TURN, _OTHERS, _NEVER = Outlook.TURN, Outlook.OTHERS, Outlook.NEVER
_RELEASE = "Ask who held it, and scontrol release it"
_RESOURCES = "[scheduler] ranks, [slurm] nodes, cpus_per_rank, gpus_per_rank, memory and constraint"
_WHO = "the account, partition or QOS of [slurm]"

REASONS: Mapping[str, Wait] = {
    "None": Wait(_TURN, "Slurm has not looked at it yet"),
    "Priority": Wait(_TURN, "jobs before it in the queue"),
    "Resources": Wait(_TURN, "nodes that are free"),
    "Prolog": Wait(_TURN, "the site's prolog runs"),
    "Cleaning": Wait(_TURN, "its last run is cleared away"),
    "BeginTime": Wait(_TURN, "its time to begin has not come"),
    "Dependency": Wait(_TURN, "a job that it depends on"),
    "SchedDefer": Wait(_TURN, "Slurm looks at it with the next batch of jobs"),
    "JobArrayTaskLimit": Wait(_TURN, "other tasks of its array"),
    "BurstBufferResources": Wait(_TURN, "room in the burst buffer"),
    "BurstBufferStageIn": Wait(_TURN, "its files are brought to the burst buffer"),
    "FedJobLock": Wait(_TURN, "the other clusters of the federation"),
    "MpiPortsBusy": Wait(_TURN, "ports for MPI"),
    "NvidiaImexChannels": Wait(_TURN, "a channel between cards of several nodes"),
    "BlockFreeAction": Wait(_TURN, "a block of nodes is freed"),
    "PowerReserved": Wait(_TURN, "power that is reserved for others"),
    "PowerNotAvail": Wait(_OTHERS, "power"),
    "MaxPoweredUpNodes": Wait(_OTHERS, "as many nodes are switched on as the site allows"),
    "Licenses": Wait(_OTHERS, "licences that other jobs hold"),
    "Reservation": Wait(_OTHERS, "its reservation has not begun, or is full", "See scontrol show reservation"),
    "ReqNodeNotAvail": Wait(
        _OTHERS,
        "nodes that it needs are down, drained, or reserved (for maintenance, as a rule)",
        "See sinfo -R and scontrol show reservation; a shorter [scheduler] time_limit_s may fit before a maintenance",
    ),
    "NodeDown": Wait(_OTHERS, "a node that it needs is down", "See sinfo -R"),
    "FrontEndDown": Wait(_OTHERS, "no front end is up", "Ask the site"),
    "PartitionDown": Wait(_OTHERS, "its partition is down", "Ask the site, or name another [slurm] partition"),
    "PartitionInactive": Wait(_OTHERS, "its partition is inactive", "Ask the site, or name another [slurm] partition"),
    "QOSUsageThreshold": Wait(_OTHERS, "its account has used more of the QOS than it may", "Name another [slurm] qos"),
    "QOSJobLimit": Wait(_OTHERS, "as many jobs of its QOS run as may"),
    "AssociationJobLimit": Wait(_OTHERS, "as many jobs of its account run as may"),
    "QOSResourceLimit": Wait(_OTHERS, "its QOS has all that it may have at once"),
    "AssociationResourceLimit": Wait(_OTHERS, "its account has all that it may have at once"),
    "AccountingPolicy": Wait(_OTHERS, "a limit of the site's accounting", f"Ask the site, or change {_WHO}"),
    "PartitionNodeLimit": Wait(
        _NEVER,
        "it asks for more or fewer nodes than its partition gives, or too many of them are down",
        "Change [slurm] nodes or partition; see scontrol show partition",
    ),
    "PartitionTimeLimit": Wait(
        _NEVER,
        "it asks for more time than its partition gives",
        "Lower [scheduler] time_limit_s, or name another [slurm] partition",
    ),
    "PartitionConfig": Wait(_NEVER, "its partition does not take such jobs", "Name another [slurm] partition"),
    "BadConstraints": Wait(_NEVER, "no node is as it asks for", f"Change {_RESOURCES}"),
    "Constraints": Wait(_NEVER, "no node is as it asks for", f"Change {_RESOURCES}"),
    "DependencyNeverSatisfied": Wait(_NEVER, "a job that it depends on has failed", "scancel it; see [slurm] flags"),
    "JobHeldUser": Wait(_NEVER, "a user held it", _RELEASE),
    "JobHeldAdmin": Wait(_NEVER, "an administrator held it", _RELEASE),
    "JobHoldMaxRequeue": Wait(_NEVER, "it was put back into the queue too often", _RELEASE),
    "InvalidAccount": Wait(_NEVER, "its account is not valid (any more)", "Change [slurm] account"),
    "InvalidQOS": Wait(_NEVER, "its QOS is not valid (any more)", "Change [slurm] qos"),
    "AccountNotAllowed": Wait(
        _NEVER, "its account may not use the partition", "Change [slurm] account or partition; see scontrol show part"
    ),
    "QOSNotAllowed": Wait(_NEVER, "its QOS may not be used there", "Change [slurm] qos or partition"),
    "QOSTimeLimit": Wait(_NEVER, "its QOS has no time left for it", "Lower [scheduler] time_limit_s, or change qos"),
    "AssociationTimeLimit": Wait(
        _NEVER, "its account has no time left for it", "Lower [scheduler] time_limit_s, or change [slurm] account"
    ),
    "ReservationDeleted": Wait(_NEVER, "its reservation was deleted", "Change [slurm] reservation"),
    "ReservationInvalid": Wait(_NEVER, "its reservation is not valid", "Change [slurm] reservation"),
    "MaxMemPerLimit": Wait(_NEVER, "it asks for more memory than the partition gives", "Lower [slurm] memory"),
    "BurstBufferOperation": Wait(_NEVER, "the burst buffer failed", "See scontrol show job, and ask the site"),
    "BlockMaxError": Wait(_NEVER, "its block of nodes fails", "Ask the site"),
    "DeadLine": Wait(_NEVER, "it can't end before its deadline", "See [slurm] flags"),
    "JobLaunchFailure": Wait(_NEVER, "it could not be started", "See job.out, and the node's slurmd.log"),
    "SystemFailure": Wait(_NEVER, "Slurm or a file system failed", "Ask the site"),
    # these say why a job has ended; one that waits with them was put back into the queue, and is held
    "NonZeroExitCode": Wait(_NEVER, "it failed, and is held", _RELEASE),
    "RaisedSignal": Wait(_NEVER, "it was ended by a signal, and is held", _RELEASE),
    "TimeLimit": Wait(_NEVER, "its time was up, and it is held", _RELEASE),
    "InactiveLimit": Wait(_NEVER, "it did nothing for too long, and is held", _RELEASE),
    "OutOfMemory": Wait(_NEVER, "its memory was used up, and it is held", _RELEASE),
}
"""Single reasons; the limits of accounts and QOS, some 150 of them, are read from how their names are built."""

_LIMIT = re.compile(
    r"(?P<of>Assoc|QOS)?(?P<kind>Grp|Max|Min)(?P<what>Unknown|Wall(Duration)?|SubmitJobs?|Jobs?|CPU|Cpu|Mem(ory)?|Node"
    r"|Energy|GRES|License|BB|Billing)(?P<minutes>(Run)?(Minutes|Mins))?(?P<per>Per(Job|Node|User|Account))?"
    r"(Limit|NotSatisfied)?"
)
_WHAT = {"Cpu": "cores", "CPU": "cores", "Mem": "memory", "Memory": "memory", "Node": "nodes", "GRES": "cards (GRES)"}
_WHAT |= {"Jobs": "jobs", "Job": "jobs", "SubmitJob": "jobs sent", "SubmitJobs": "jobs sent", "License": "licences"}
_WHAT |= {"Energy": "energy", "BB": "burst buffer", "Billing": "billing units", "Unknown": "some resource"}
_WHAT |= {"Wall": "time", "WallDuration": "time"}


def wait_for(reason: str) -> Wait | None:
    """What a reason means; None if it is not known.

    Parameters
    ----------
    reason : str
        As ``squeue -o %r`` says it: ``Priority``, or with more behind a comma, as in
        ``ReqNodeNotAvail, UnavailableNodes:n[1-2]``.
    """
    word = reason.partition(",")[0].strip("() ")
    return REASONS.get(word) or _limit(word)


def explained(reason: str) -> str:
    """What to tell of a job that waits: ``waits for ever (<Slurm's word>): <why>. <what to do>``."""
    wait = wait_for(reason)
    if wait is None:
        return f"{Outlook.UNKNOWN}: {reason}"
    return f"{wait.outlook} ({reason}): {wait.why}" + (f". {wait.cure}" if wait.cure else "")


def never_ends(reason: str) -> bool:
    """Whether a job with this reason starts only if somebody changes something."""
    wait = wait_for(reason)
    return wait is not None and wait.outlook is Outlook.NEVER


def _limit(word: str) -> Wait | None:
    found = _LIMIT.fullmatch(word)
    if found is None:
        return None
    owner = {"Assoc": "account", "QOS": "QOS", None: "account or QOS"}[found["of"]]
    what, per = _WHAT[found["what"]], (found["per"] or "").removeprefix("Per").lower()
    running = (found["minutes"] or "").startswith("Run")
    what += f" x minutes{' of running jobs' if running else ''}" if found["minutes"] else ""
    if found["kind"] == "Min":
        return Wait(_NEVER, f"it asks for fewer {what} than its QOS wants at least", f"Change {_RESOURCES}, or qos")
    if found["kind"] == "Max" and per in ("job", "node"):
        cure = "Lower [scheduler] time_limit_s" if "time" in what or "minutes" in what else f"Lower one of {_RESOURCES}"
        return Wait(_NEVER, f"it asks for more {what} than its {owner} gives one {per}", f"{cure}, or change {_WHO}")
    if found["kind"] == "Grp" and not running and (found["minutes"] or found["what"] == "Wall"):
        why = f"its {owner} has used up its {what}, or this job would use more than are left"
        return Wait(_NEVER, why, f"Ask the site for more, or change {_WHO}")
    whose = per or owner
    return Wait(_OTHERS, f"its {whose} has all the {what} that it may have at once", f"If that stays, change {_WHO}")
