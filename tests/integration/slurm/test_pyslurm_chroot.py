"""The schedulers pyslurm and slurm under another Slurm than the one that is installed here: that of Debian sid.

The chroot is made once (two to three minutes, 1 GB) where ``EMFLOW_SID`` says, and used again.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SID_SH = HERE / "sid.sh"

pytestmark = [pytest.mark.slow, pytest.mark.needs_sid, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def sid(sid_folder: Path) -> Path:
    """The chroot; one that can't be made, since sid has moved on, skips with what failed."""
    made = subprocess.run([SID_SH, "make", sid_folder], capture_output=True, text=True, timeout=1500, check=False)
    if made.returncode == 69:
        pytest.skip(f"no chroot: {made.stderr.strip()[-300:]}")
    assert made.returncode == 0, made.stderr[-3000:]
    return sid_folder


def pytest_in(root: Path, *arguments: str) -> str:
    needs = "EMFLOW_REQUIRE=slurm,pyslurm,mpi"
    command = [SID_SH, "run", root, "env", needs, "python", "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("scheduler", ["pyslurm", "slurm"])
def test_contract(sid: Path, scheduler: str) -> None:
    said = pytest_in(sid, "tests/contract/test_schedulers.py", "-k", f"[{scheduler}]")
    assert "passed" in said
    assert "skipped" not in said


def test_pyslurm_beside_sbatch_and_in_trouble(sid: Path) -> None:
    assert "passed" in pytest_in(sid, "tests/integration/slurm/test_pyslurm.py")


def test_nothing_is_left_of_a_run_that_is_killed(sid: Path) -> None:
    run = subprocess.Popen(
        [SID_SH, "run", sid, "bash", "-c", "echo there; sleep 600"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"there\n"
    run.kill()
    run.wait(30)
    assert run.stdout.read() == b"", "what held the pipe lives on"
    run.stdout.close()
    assert str(sid) not in Path("/proc/self/mountinfo").read_text()
    assert not os.path.ismount(sid / "proc")
