"""Slurm's own words, all of them: states, reasons and refusals.

The lists under ``recorded/<version>`` are the words of ``job_state_string`` (states), ``job_state_string_complete``
(flags behind a comma) and ``job_reason_string`` (reasons) in the source of each release; the installed Slurm is asked
for its own.  ``squeue.txt`` and ``sacct.txt`` are what the commands of that version printed, see ``recorded/README``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emflow.records import EndCause, SchedulerPhase
from emflow.schedulers.slurm_commands import REFUSALS, refused
from emflow.schedulers.slurm_reasons import REASONS, Outlook, explained, never_ends, wait_for
from emflow.schedulers.slurm_rows import Row, parse_memory, parse_sacct, parse_squeue, seconds
from emflow.schedulers.slurm_states import FLAGS, STATES, judge

RECORDED = Path(__file__).parent / "recorded"
VERSIONS = sorted(path.name for path in RECORDED.iterdir() if path.is_dir())
every_version = pytest.mark.parametrize("version", VERSIONS)

ENDS = {
    "COMPLETED": EndCause.COMPLETED,
    "CANCELLED": EndCause.CANCELLED,
    "FAILED": EndCause.FAILED,
    "TIMEOUT": EndCause.TIMEOUT,
    "NODE_FAIL": EndCause.NODE_FAIL,
    "PREEMPTED": EndCause.PREEMPTED,
    "BOOT_FAIL": EndCause.BOOT_FAIL,
    "DEADLINE": EndCause.DEADLINE,
    "OUT_OF_MEMORY": EndCause.OUT_OF_MEMORY,
}
"""The states that Slurm itself calls finished: ``IS_JOB_FINISHED``, everything behind JOB_SUSPENDED."""


def words(version: str, of: str) -> list[str]:
    found = (RECORDED / version / f"{of}.txt").read_text().split()
    assert len(found) > 10
    return found


def test_versions_are_there() -> None:
    assert {"20.11", "22.05", "24.11", "25.11", "26.05"} <= set(VERSIONS)


# --- states


@every_version
def test_every_state_is_known_and_ends_a_job_only_if_slurm_says_so(version: str) -> None:
    for word in words(version, "states"):
        meaning = judge(word)
        assert meaning.phase is not SchedulerPhase.UNKNOWN, word
        assert meaning.ended == (word in ENDS), word
        assert meaning.cause is ENDS.get(word, EndCause.UNSAID), word


@every_version
def test_every_flag_behind_a_state_is_known(version: str) -> None:
    for flag in words(version, "flags"):
        meaning = judge(f"RUNNING,{flag}")
        assert meaning.phase in (SchedulerPhase.PENDING, SchedulerPhase.RUNNING), flag
        assert flag in STATES or flag in FLAGS


def test_every_cause_is_reached() -> None:
    assert {meaning.cause for meaning in STATES.values()} == set(EndCause)


@pytest.mark.parametrize(
    "said", ["", "?", "WARP_CORE_BREACH", "RUNNING,WARP", "LAUNCH_FAILED", "completed", "COMPLETE"]
)
def test_unknown_word_is_unknown_and_ends_nothing(said: str) -> None:
    meaning = judge(said)
    assert (meaning.phase, meaning.cause) == (SchedulerPhase.UNKNOWN, EndCause.UNSAID)
    assert meaning.text


@pytest.mark.parametrize(
    ("said", "phase", "cause"),
    [
        ("CANCELLED by 1000", SchedulerPhase.ENDED, EndCause.CANCELLED),
        ("CANCELLED+", SchedulerPhase.ENDED, EndCause.CANCELLED),
        ("OUT_OF_ME+", SchedulerPhase.UNKNOWN, EndCause.UNSAID),
        ("COMPLETED,COMPLETING", SchedulerPhase.RUNNING, EndCause.UNSAID),
        ("RUNNING COMPLETING", SchedulerPhase.RUNNING, EndCause.UNSAID),
        ("FAILED,LAUNCH_FAILED", SchedulerPhase.ENDED, EndCause.FAILED),
        ("PENDING,REQUEUED", SchedulerPhase.PENDING, EndCause.UNSAID),
        (" RUNNING ", SchedulerPhase.RUNNING, EndCause.UNSAID),
    ],
)
def test_forms_of_a_state(said: str, phase: SchedulerPhase, cause: EndCause) -> None:
    meaning = judge(said)
    assert (meaning.phase, meaning.cause) == (phase, cause)


# --- reasons


@every_version
def test_every_reason_is_explained(version: str) -> None:
    for word in words(version, "reasons"):
        wait = wait_for(word)
        assert wait is not None, word
        assert wait.why
        assert word in explained(word)
        # who must do something is told what
        assert wait.cure or wait.outlook is not Outlook.NEVER, word


@pytest.mark.parametrize(
    "word",
    [
        *("PartitionNodeLimit", "PartitionTimeLimit", "DependencyNeverSatisfied", "BadConstraints", "JobHeldUser"),
        *("JobHeldAdmin", "InvalidAccount", "InvalidQOS", "QOSMaxCpuPerJobLimit", "QOSMaxWallDurationPerJobLimit"),
        *("AssocGrpCPUMinutesLimit", "AssocMaxNodePerJobLimit", "QOSMinCpuNotSatisfied", "AssocGrpWallLimit"),
        *("QOSMaxMemoryPerNode", "AssocMaxGRESPerJob", "QOSGrpBillingMinutes", "AssocMaxCpuMinutesPerJobLimit"),
        "ReservationDeleted",
    ],
)
def test_reasons_that_only_a_person_can_change(word: str) -> None:
    assert never_ends(word)
    assert explained(word).startswith("waits for ever (")


@pytest.mark.parametrize(
    "word",
    [
        *("Priority", "Resources", "None", "BeginTime", "Licenses", "QOSGrpCpuLimit", "AssocGrpCPURunMinutesLimit"),
        *("QOSMaxJobsPerUserLimit", "AssocMaxJobsLimit", "MaxCpuPerAccount", "QOSMaxSubmitJobPerUserLimit"),
        *("ReqNodeNotAvail", "PartitionDown", "MaxCpuRunMinsPerUser", "Unheard-of"),
    ],
)
def test_reasons_that_pass(word: str) -> None:
    assert not never_ends(word)


def test_reason_with_more_behind_it_and_an_unknown_one() -> None:
    told = explained("ReqNodeNotAvail, UnavailableNodes:n[1-2]")
    assert told.startswith("waits for others (ReqNodeNotAvail, UnavailableNodes:n[1-2]): nodes that it needs are down")
    assert explained("FluxCapacitor") == "waits, and Slurm says: FluxCapacitor"


# --- what the commands print


@pytest.mark.parametrize("version", [v for v in VERSIONS if (RECORDED / v / "squeue.txt").exists()])
def test_recorded_output_is_read(version: str) -> None:
    expected = json.loads((RECORDED / version / "expected.json").read_text())
    for command, parse in (("squeue", parse_squeue), ("sacct", parse_sacct)):
        rows = {row.name[-2:]: row for row in parse((RECORDED / version / f"{command}.txt").read_text())}
        assert rows.keys() == expected[command].keys()
        for number, (state, nodes, elapsed_s) in expected[command].items():
            row = rows[number]
            assert (judge(row.state).phase.value, judge(row.state).cause.value) == tuple(state), row
            assert (row.nodes if row.node else 0, row.elapsed_s) == (nodes, elapsed_s), row


def test_lines_that_are_no_job_are_left_out() -> None:
    text = (
        "slurm_load_jobs error: whatever\n\n17|0123456789abcdef-01|RUNNING|1|0:05|n1|None\n"
        "17_4|x|RUNNING|1|0:05|n1|None\n17+0|x|RUNNING|1|0:05|n1|None\n18|y|RUNNING|1\n²|z|RUNNING|1|0:05|n1|None\n"
        "19|0123456789abcdef-02|PENDING|1|0:00|n/a|a reason | with | bars\n"
    )
    assert list(parse_squeue(text)) == [
        Row("17", "0123456789abcdef-01", "RUNNING", 1, 5.0, "n1", "None"),
        Row("19", "0123456789abcdef-02", "PENDING", 1, 0.0, "", "a reason | with | bars"),
    ]
    assert list(parse_sacct("17.batch|batch|RUNNING|1|5|n1\n17|x|CANCELLED by 0|1|5|None assigned\n")) == [
        Row("17", "x", "CANCELLED by 0", 1, 5.0, "")
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:00", 0), ("1:05", 65), ("2:00:01", 7201), ("3-04:05:06", 273906), ("INVALID", 0), ("", 0), ("-1:00", 0)],
)
def test_time_used(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("JobId=1 NumNodes=1 NumCPUs=1 NumTasks=1 MinMemoryNode=100M MinTmpDiskNode=0", 100),
        ("JobId=1 NumNodes=2 NumCPUs=2 NumTasks=2 MinMemoryNode=3G MinTmpDiskNode=0", 3072),
        ("JobId=1 NumNodes=2 NumCPUs=8 NumTasks=2 MinMemoryCPU=1.50G MinTmpDiskNode=0", 6144),
        ("JobId=1 NumNodes=1-1 NumCPUs=4 NumTasks=2 MinMemoryNode=0 MinTmpDiskNode=0", 0),
        ("slurm_load_jobs error: Invalid job id specified", 0),
    ],
)
def test_memory_of_a_node(record: str, expected: int) -> None:
    assert parse_memory(record) == expected


@pytest.mark.parametrize(
    "said",
    [
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "Batch job submission failed: Socket timed out on send/recv operation",
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "Batch job submission failed: Required partition not available (inactive or drain)",
        "Batch job submission failed: Requested nodes are busy",
        "Batch job submission failed: Slurm temporarily unable to accept job, sleeping and retrying",
        "Batch job submission failed: System submissions disabled",
        "I/O error writing script/environment to file",
        "Unable to contact slurm controller (connect failure); Invalid partition name specified",
        "something that no release of Slurm has said yet",
        "",
    ],
)
def test_what_may_pass_is_no_refusal(said: str) -> None:
    assert refused(said) == ""


# --- the installed Slurm

_OWN_WORDS = """
import ctypes, glob, json
folders = ("/usr/lib/*/slurm*", "/usr/lib*/slurm*", "/opt/slurm/lib*/slurm")
names = [found for folder in folders for found in glob.glob(folder + "/libslurmfull.so")]
library = ctypes.CDLL(names[0])
def words(function, numbers):
    call = getattr(library, function)
    call.restype = ctypes.c_char_p
    return sorted({(call(n) or b"").decode() for n in numbers})
print(json.dumps({
    "states": words("slurm_job_state_string", [*range(12), *(1 << bit for bit in range(8, 31))]),
    "reasons": words("slurm_job_reason_string", range(250)) if hasattr(library, "slurm_job_reason_string") else [],
    "errors": words("slurm_strerror", range(1000, 10000)),
}))
"""


@pytest.fixture(scope="module")
def own_words() -> dict[str, list[str]]:
    """What the installed Slurm's library can say."""
    done = subprocess.run([sys.executable, "-c", _OWN_WORDS], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"libslurmfull.so can't be asked: {done.stderr.strip()[-120:]}")
    return json.loads(done.stdout)


@pytest.mark.needs_slurm
def test_installed_slurm_says_no_state_that_is_not_known(own_words: dict[str, list[str]]) -> None:
    assert len(own_words["states"]) >= 20
    assert [word for word in own_words["states"] if word not in STATES and word != "?"] == []


@pytest.mark.needs_slurm
def test_installed_slurm_gives_no_reason_that_is_not_explained(own_words: dict[str, list[str]]) -> None:
    said = [word for word in own_words["reasons"] if word and not word.isdigit()]
    assert [word for word in said if wait_for(word) is None] == []
    assert not said or len(set(said) & set(REASONS)) > 30


@pytest.mark.needs_slurm
def test_refusals_are_slurm_s_own_words(own_words: dict[str, list[str]]) -> None:
    """But for what sbatch and getopt say themselves, which test_requests.py provokes."""
    elsewhere = {"Memory specification can not be satisfied", "unrecognized option", "invalid option"}
    assert set(REFUSALS) - set(own_words["errors"]) <= elsewhere
