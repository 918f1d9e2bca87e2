"""The scheduler pyslurm where pyslurm is not: what its flags become, and what it says of a library that it can't use.

Where pyslurm stands in a test, it is a module that fails as the real one was seen to: 25.11.2, under Slurm 26.05.5.
The real one is in tests/integration/slurm/test_pyslurm.py.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from emflow.config import load
from emflow.errors import SubmitError, Unavailable
from emflow.records import Resources
from emflow.schedulers import site
from emflow.schedulers.local import shipped
from emflow.schedulers.protocol import Scheduler
from emflow.schedulers.pyslurm import PySlurmScheduler
from emflow.schedulers.pyslurm_fields import DEFAULTS, FIELDS, SWITCHES, directives, fields, variables
from emflow.schedulers.pyslurm_library import Library

NAME = "0123456789abcdef-01"


def configured(folder: Path, rest: str = "") -> PySlurmScheduler:
    path = folder / "emflow.toml"
    path.write_text(f'[[watch]]\nroot = "share"\n[scheduler]\nuse = "pyslurm"\n{rest}')
    return PySlurmScheduler.from_config(load(path))


@pytest.fixture
def stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module called pyslurm of a test's own, found before any other."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder / "pyslurm.py"


WORKS = """
import os, signal
__version__ = "{version}"
class RPCError(Exception):
    errno = 0
class slurmctld:
    class Config:
        version = "{cluster}"
        load = classmethod(lambda cls: cls)
class Jobs(dict):
    @staticmethod
    def load():
        {jobs}
"""


# --- flags


def test_request_becomes_fields() -> None:
    said = fields(("--job-name=a", "--ntasks=8", "--nodes=2", "--mem=2G", "--time=0-01:00:00", "--no-requeue"))
    assert said == {
        "name": "a",
        "ntasks": 8,
        "nodes": "2",
        "memory_per_node": 2048,
        "time_limit": "0-01:00:00",
        "is_requeueable": False,
        "profile_types": "none",
    }


def test_last_of_two_flags_counts() -> None:
    assert fields(("--ntasks=1", "--requeue", "--ntasks=4", "--no-requeue")) == {
        **DEFAULTS,
        "ntasks": 4,
        "is_requeueable": False,
    }


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--signal=USR1@60", {"signal": signal.SIGUSR1, "time": 60}),
        ("--signal=B:SIGUSR2@5", {"signal": signal.SIGUSR2, "time": 5, "batch_only": True}),
        ("--signal=BR:15", {"signal": 15, "time": 60, "batch_only": True, "allow_reservation_overlap": True}),
        ("--mem=500", 500),
        ("--mem=100K", 1),
        ("--mem=1T", 1 << 20),
        ("--time=30", 30),
        ("--gpus-per-node=a100:2", {"gpu:a100": 2}),
        ("--gpus-per-node=2", {"gpu": 2}),
        ("--kill-on-invalid-dep=yes", True),
    ],
)
def test_value_of_a_field(flag: str, value: object) -> None:
    field = FIELDS[flag[2:].partition("=")[0]][0]
    assert fields([flag])[field] == value


@pytest.mark.parametrize(
    "flag",
    [
        "--hint=nomultithread",
        "--export=NIL",
        "--export=ALL,X=1",
        "--wrap=true",
        "--no-requeue=1",
        "--ntasks",
        "--ntasks=",
        "--ntasks=two",
        "--mem=0",
        "--mem=1.5G",
        "--nodes=2,4",
        "--nodes=0",
        "--signal=NOPE@3",
        "--signal=USR1@1m",
        "--gpus-per-node=a100",
        "-n2",
        "",
    ],
)
def test_flag_without_a_field_is_refused_by_name(flag: str) -> None:
    with pytest.raises(SubmitError) as refused:
        fields(["--ntasks=1", flag])
    assert not refused.value.transient
    assert flag.partition("=")[0] in str(refused.value)
    assert 'use = "slurm"' in str(refused.value)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("name", site.site_names())
def test_every_flag_of_a_shipped_site_has_a_field_or_is_named(name: str, device: str, tmp_path: Path) -> None:
    path = tmp_path / "emflow.toml"
    path.write_text(
        f'[[watch]]\nroot = "share"\n[slurm]\nsite = "{name}"\naccount = "a"\npartition = "p"\nqos = "q"\n'
        f'constraint = "c"\nreservation = "r"\nmemory = "4 GiB"\nnodes = 2\n[kernels]\ndevice = "{device}"\n'
    )
    request = site.request(load(path), Resources(ranks=4, time_limit_s=3600))
    without = [flag for flag in request.flags if flag[2:].partition("=")[0] not in {**FIELDS, **SWITCHES}]
    # GPU binding of AMD cards, which mpi_kernels does not compute on
    assert without == (["--gpu-bind=closest"] if (name, device) == ("frontier", "gpu") else [])
    assert fields(flag for flag in request.flags if flag not in without)["ntasks"] == 4


@pytest.mark.parametrize("script", ["reduce.sbatch", "reduce-gpu.sbatch", "pool.sbatch"])
def test_lines_of_job_scripts_have_fields(script: str) -> None:
    if not shipped(script).exists():
        pytest.skip(f"no {script}")
    said = fields(directives(shipped(script)))
    assert said["is_requeueable"] is False
    assert said["kill_on_invalid_dependency"] is True


def test_lines_count_only_before_the_first_command(tmp_path: Path) -> None:
    script = tmp_path / "s"
    script.write_text("#!/bin/bash\n# a\n\n#SBATCH --ntasks=2 --nodes=1\n##SBATCH --qos=x\ntrue\n#SBATCH --ntasks=9\n")
    assert directives(script) == ("--ntasks=2", "--nodes=1")


def test_job_is_told_what_sbatch_would_tell_it() -> None:
    assert variables(fields(("--ntasks=2", "--cpus-per-task=3"))) == {"SLURM_CPUS_PER_TASK": "3"}


def test_rehearsal_shows_the_fields(tmp_path: Path) -> None:
    scheduler = configured(tmp_path, '[slurm]\nflags = ["--licenses=matlab:2"]\n')
    tried = scheduler.rehearse(Resources(ranks=3, time_limit_s=60))
    assert tried.command[0] == "pyslurm.JobSubmitDescription"
    assert {"ntasks=3", "licenses='matlab:2'", "is_requeueable=False"} <= set(tried.command)
    assert "pyslurm has no dry run" in tried.said
    assert tried.script.startswith("#!/bin/bash")


def test_rehearsal_names_the_flag_that_has_no_field(tmp_path: Path) -> None:
    scheduler = configured(tmp_path, '[slurm]\nflags = ["--hint=nomultithread"]\n')
    tried = scheduler.rehearse(Resources())
    assert not tried.ok
    assert "--hint=nomultithread" in tried.said


# --- the library


@pytest.mark.skipif(importlib.util.find_spec("pyslurm") is not None, reason="pyslurm is installed")
def test_missing_pyslurm_is_said_with_its_cure(tmp_path: Path) -> None:
    scheduler = configured(tmp_path)
    assert isinstance(scheduler, Scheduler)
    for ask in (
        lambda: scheduler.submit(NAME, tmp_path, Resources()),
        lambda: scheduler.find(NAME, tmp_path),
        lambda: scheduler.poll({NAME: "17"}),
        lambda: scheduler.cancel("17"),
    ):
        with pytest.raises(Unavailable, match="No module named 'pyslurm'") as refused:
            ask()
        assert '[scheduler] use = "slurm" does without it' in str(refused.value)
    first = scheduler.check()[0]
    assert (first.part, first.ok) == ("pyslurm", False)
    assert 'use = "slurm"' in first.found
    assert "pip install" in first.fix
    scheduler.close()


def test_pyslurm_of_another_release_is_not_used(tmp_path: Path, stands_in: Path) -> None:
    stands_in.write_text(WORKS.format(version="25.11.2", cluster="26.05.5", jobs="return Jobs()"))
    with pytest.raises(Unavailable, match=r"pyslurm .* does not belong to the cluster") as refused:
        Library().listed([NAME])
    assert "pyslurm==26.5.*" in str(refused.value)
    first = configured(tmp_path).check()[0]
    assert not first.ok
    assert "26.05.5" in first.found


def test_patch_releases_belong_together(stands_in: Path) -> None:
    stands_in.write_text(WORKS.format(version="25.11.2", cluster="25.11.0-rc1", jobs="return Jobs()"))
    library = Library()
    assert library.versions() == "pyslurm 25.11.2, Slurm 25.11.0-rc1"
    assert library.listed([NAME]) == []
    library.close()


def test_library_that_ends_its_process_ends_only_the_child(stands_in: Path) -> None:
    # what libslurm does without a slurm.conf
    stands_in.write_text(
        "import os\nos.write(2, b'python: fatal: Could not establish a configuration source\\n')\nos._exit(1)\n"
    )
    with pytest.raises(Unavailable, match="fatal: Could not establish a configuration source") as refused:
        Library().listed([NAME])
    assert "SLURM_CONF" in str(refused.value)


def test_slurm_conf_that_is_not_there_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the real library: "file stat failed, retrying" for 60 s
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "absent.conf"))
    with pytest.raises(Unavailable, match=r"SLURM_CONF names no file: .*absent\.conf"):
        Library().listed([NAME])


def test_dead_child_is_told_and_replaced(tmp_path: Path, stands_in: Path) -> None:
    once = tmp_path / "once"
    jobs = f"os.path.exists({str(once)!r}) or (open({str(once)!r}, 'x'), os.kill(os.getpid(), signal.SIGKILL))"
    stands_in.write_text(WORKS.format(version="25.11.2", cluster="25.11.4", jobs=f"{jobs}; return Jobs()"))
    library = Library()
    with pytest.raises(Unavailable, match="no answer"):
        library.listed([NAME])
    assert library.listed([NAME]) == []
    library.close()


def test_child_ends_with_its_parent_s_pipe(stands_in: Path) -> None:
    stands_in.write_text(WORKS.format(version="25.11.2", cluster="25.11.4", jobs="return Jobs()"))
    library = Library()
    library.listed([NAME])
    child = library._child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()  # as the kernel does when a service is killed
    assert child.wait(20) == 0
    assert not Path(f"/proc/{child.pid}").exists() or os.kill(child.pid, 0) is None
    library.close()
