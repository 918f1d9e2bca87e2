"""The job scripts under the real sbatch: set-up file, environment, container, signals, cards, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cluster import TUNED, Cluster
from emflow import registry
from emflow.config import Config, load
from emflow.records import Resources, SchedulerPhase
from emflow.schedulers.protocol import Scheduler
from emflow.schedulers.site import site_names
from emflow.submission import submission
from mpi_kernels import jsonfile
from mpi_kernels.contract import (
    JOB_FILE,
    RESULT_FILE,
    JobSpec,
    Method,
    Recipe,
    ReductionSpec,
    ResultManifest,
    SourceSpec,
)

pytestmark = [pytest.mark.needs_slurm, pytest.mark.needs_mpi]

SCRIPTS = Path(__file__).parents[3] / "slurm"
ENDED = {SchedulerPhase.ENDED, SchedulerPhase.GONE}
# What a site's batch script may look like that is none of ours: the four lines, and other ranks.
OTHER = """#!/bin/bash
#SBATCH --ntasks=2
#SBATCH --time=00:05:00
set -euo pipefail
source "$EMFLOW_SITE"
trap 'echo shell >> "$1/told"' USR1
set_up_site
start_ranks waiting_for_usr1 "$1"
"""
WAITING = """
import os, signal, sys, time
def told(number, frame):
    with open(sys.argv[1] + "/told", "a") as out:
        out.write("rank" + os.environ["SLURM_PROCID"] + chr(10))
    sys.exit(0)
signal.signal(signal.SIGUSR1, told)
open(sys.argv[1] + "/ready-" + os.environ["SLURM_PROCID"], "w").close()
while True:
    time.sleep(0.05)
"""
# Debian has no Apptainer.  This stands for its command line only: it notes what it was asked for, and enters nothing.
STAND_IN = """#!/bin/bash
printf '%s\\n' "$@" >"$(dirname -- "$0")/asked-$SLURM_PROCID"
while [[ $1 != *.sif ]]; do shift; done
shift
exec "$@"
"""


@pytest.fixture(autouse=True)
def cluster(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    return slurm


@pytest.fixture(scope="module")
def with_cards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that looks like the sites of the profiles: 64 cores, 4 cards and features; the cards are files."""
    root = tmp_path_factory.mktemp("cards") / "cluster"
    nodes = "GresTypes=gpu\nNodeName=DEFAULT Gres=gpu:4 Feature=cpu,gpu,nvme"
    partitions = "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    found = Cluster(root, cpus=64, memory_mib=500_000, scheduling=f"{TUNED}\n{nodes}", partitions=partitions)
    for number in range(4):
        (root / f"card{number}").touch()
    (root / "gres.conf").write_text(f"Name=gpu File={root}/card[0-3]\n")
    try:
        found.start()
        yield found
    finally:
        found.stop()


def configured(folder: Path, slurm: str = "", rest: str = "", *, ranks: int = 2, use: str = "slurm") -> Config:
    path = folder / "emflow.toml"
    path.write_text(
        f'[[watch]]\nroot = "share"\n[scheduler]\nuse = "{use}"\nranks = {ranks}\n[slurm]\n{slurm}\n{rest}\n'
    )
    return load(path)


def run_folder(root: Path, *, ranks: int = 2, device: Any = "cpu") -> tuple[str, Path]:
    """A run folder as the service makes it, over a scan of 2 x 3 frames."""
    acquisition = hashlib.blake2b(bytes(root), digest_size=8).hexdigest()
    folder = root / "runs" / "2024-05-01" / acquisition / "01"
    folder.mkdir(parents=True)
    source = folder.parent / "scan.npy"
    np.save(source, np.arange(120, dtype=np.uint16).reshape(2, 3, 4, 5))
    spec = JobSpec(
        job=f"{acquisition}-01",
        acquisition=acquisition,
        trace=acquisition,
        recipe=Recipe(name="t", reductions=(ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="p"),)),
        source=SourceSpec(path=str(source), format=registry.target("formats", "npy")),
        ranks=ranks,
        method=Method(device=device),
    )
    jsonfile.publish(folder / JOB_FILE, jsonfile.encode(spec))
    return spec.job, folder


def scheduler_of(config: Config) -> Scheduler:
    made: Scheduler = registry.load("schedulers", "slurm").from_config(config)
    return made


def sent(cluster: Cluster, config: Config, name: str, folder: Path) -> str:
    """Send a job, wait for its end, and give its output."""
    scheduler = scheduler_of(config)
    ranks = config.scheduler.ranks
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=ranks, time_limit_s=240))
    cluster.until(
        lambda: scheduler.poll({name: scheduler_id})[name].phase in ENDED, "the job does not end", seconds=50.0
    )
    output = folder / "job.out"
    return output.read_text() if output.exists() else ""


def manifest(folder: Path) -> ResultManifest:
    return jsonfile.decode(ResultManifest, (folder / RESULT_FILE).read_bytes(), path=folder / RESULT_FILE)


def test_a_run_folder_becomes_a_result_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    setup = tmp_path / "set up.sh"
    setup.write_text('env -0 >"$PWD/environment"\n[[ $# -eq 0 ]]\n')
    name, folder = run_folder(tmp_path)
    config = configured(tmp_path, 'setup = "set up.sh"\nnodes = 2\ncpus_per_rank = 2')
    os.environ["SECRET_TOKEN"] = "no job's business"
    try:
        said = sent(cluster, config, name, folder)
    finally:
        del os.environ["SECRET_TOKEN"]
    assert said == ""
    assert manifest(folder).ranks == 2
    listed = (folder / "environment").read_text().split("\0")
    environment = dict(line.split("=", 1) for line in listed if line)
    assert environment["SLURM_JOB_NUM_NODES"] == "2"
    # by Slurm and bash themselves
    others = {name for name in environment if not name.startswith(("SLURM", "EMFLOW_"))}
    assert others <= {"PATH", "HOME", "LANG", "USER", "LOGNAME"} | {"ENVIRONMENT", "HOSTNAME", "TMPDIR"} | {
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
    }
    assert "SLURM_GET_USER_ENV" not in environment, "Slurm read the user's login files"


def test_what_the_script_sets_reaches_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "import os\nprint(*(os.environ.get(n) for n in ('SLURM_CPUS_PER_TASK', 'OMP_NUM_THREADS', 'PYTHONSAFEPATH')))\n"
    )
    (tmp_path / "other.sbatch").write_text(OTHER.replace("waiting_for_usr1", "asks"))
    # as a person may send it by hand: with a list of names srun would pass on only those
    names = "--export=PATH,EMFLOW_PYTHON,EMFLOW_SITE,PYTHONPATH"
    done = sbatch(cluster, tmp_path, "--wait", "--cpus-per-task=2", names, f"--output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "2 2 1\n" * 2


def sbatch(cluster: Cluster, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "EMFLOW_PYTHON": sys.executable,
        "EMFLOW_SITE": str(SCRIPTS / "site.sh"),
        "PYTHONPATH": str(folder),
        **cluster.environment,
    }
    command = ["sbatch", "--parsable", *flags, str(folder / "other.sbatch"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment, check=False)


def test_the_signal_before_the_end_reaches_every_rank_and_not_the_script(cluster: Cluster, tmp_path: Path) -> None:
    """What ``--signal=USR1@60`` does at its time, ``scancel --signal=USR1`` does now: both go to the steps."""
    (tmp_path / "waiting_for_usr1.py").write_text(WAITING)
    (tmp_path / "other.sbatch").write_text(OTHER)
    job = sbatch(cluster, tmp_path, f"--output={tmp_path}/out").stdout.strip()
    cluster.until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "the ranks do not start", seconds=30.0)
    cluster.run("scancel", "--signal=USR1", job)
    state = ("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")
    cluster.until(lambda: cluster.run(*state).strip() == "COMPLETED", "the job does not end", seconds=30.0)
    assert sorted((tmp_path / "told").read_text().split()) == ["rank0", "rank1"]


@pytest.mark.parametrize(
    ("own", "setup", "says"),
    [
        ('setup = "s.sh"', "return 3\n", "the set-up file ended with 3"),
        ('setup = "s.sh"', None, "the set-up file ([slurm] setup) is no file"),
        ('setup = "s.sh"', "everybody", "can be written by everybody"),
        ('mpi = "pmi3"', None, "has no --mpi=pmi3 ([slurm] mpi)"),
        ('mpi = "pmi2 --help"', None, "has no --mpi=pmi2 --help"),
        ('container = "c.sif"', None, "the container is not there"),
        ('container = "emflow.toml"', None, "has no apptainer on PATH: load it in [slurm] setup"),
        ('python = "/nowhere/python"', None, "/nowhere/python"),
    ],
)
def test_a_job_that_can_not_run_says_in_seconds_what_to_mend(
    cluster: Cluster, tmp_path: Path, own: str, setup: str | None, says: str
) -> None:
    if setup is not None:
        (tmp_path / "s.sh").write_text(setup)
        (tmp_path / "s.sh").chmod(0o666 if setup == "everybody" else 0o644)
    name, folder = run_folder(tmp_path)
    assert says in sent(cluster, configured(tmp_path, own), name, folder)
    assert not (folder / RESULT_FILE).exists()


def test_hostile_values_are_never_run(cluster: Cluster, tmp_path: Path) -> None:
    """Every text that a job is made of, as a name that a shell would obey if it ever saw it."""
    evil = "a b;touch owned;$(touch owned)`touch owned`'\"\\ &"
    root = tmp_path / evil
    root.mkdir()
    (root / f"{evil}.sh").write_text('touch "$PWD/was-set-up"\n')
    name, folder = run_folder(root)
    keys = {"account": evil, "setup": f"{evil}.sh"}
    # a wrapper, since a virtual environment is found beside the real interpreter
    python = root / f"{evil}.python"
    python.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    keys["python"] = str(python)
    own = "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    assert sent(cluster, configured(root, own), name, folder) == ""
    assert manifest(folder).ranks == 2
    assert (folder / "was-set-up").exists()
    refused = submission(configured(root, f"flags = {json.dumps([f'--licenses={evil}'])}"))
    assert not refused.ok
    assert "icense" in refused.said
    assert not [path for path in (*tmp_path.rglob("owned"), Path("owned"), Path.home() / "owned") if path.exists()]


def test_a_container_is_entered_by_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apptainer").write_text(STAND_IN)
    (programs / "apptainer").chmod(0o755)
    (tmp_path / "setup.sh").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\nexport APPTAINER_BIND=/etc:/etc\n")
    (tmp_path / "em.sif").touch()
    (tmp_path / "share").mkdir()
    name, folder = run_folder(tmp_path)
    config = configured(tmp_path, f'container = "em.sif"\nsetup = "setup.sh"\npython = "{sys.executable}"')
    assert sent(cluster, config, name, folder) == ""
    assert manifest(folder).ranks == 2
    asked = [(programs / f"asked-{rank}").read_text().splitlines() for rank in range(2)]
    assert asked[0] == asked[1]
    assert asked[0] == [
        *("exec", "--no-home", "--pwd", "/"),
        # the writable one last: it lies below the first
        *("--bind", f"{tmp_path}:{tmp_path}:ro", "--bind", f"{tmp_path / 'share'}:{tmp_path / 'share'}:ro"),
        *("--bind", str(tmp_path / "runs")),
        str(tmp_path / "em.sif"),
        *(sys.executable, "-m", "mpi4py", "-m", "mpi_kernels", str(folder)),
    ]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("name", site_names())
def test_slurm_would_take_what_each_profile_asks_for(
    with_cards: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, device: str
) -> None:
    """By ``--test-only``.  Without slurmdbd Slurm knows no accounts and no QOS, so it does not judge these two."""
    monkeypatch.setenv("SLURM_CONF", with_cards.environment["SLURM_CONF"])
    own = f'site = "{name}"\naccount = "m1234"'
    found = submission(configured(tmp_path, own, f'[kernels]\ndevice = "{device}"'))
    assert found.ok, found.said
    assert "to start at" in found.said
    assert Path(found.script).name == ("reduce-gpu.sbatch" if device == "gpu" else "reduce.sbatch")
    # and it is judged at all
    wrong = submission(configured(tmp_path, f'{own}\nconstraint = "no-such-feature"'))
    assert not wrong.ok


def test_each_rank_is_bound_to_a_card_and_without_one_computes_on_its_processor(
    with_cards: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", with_cards.environment["SLURM_CONF"])
    name, folder = run_folder(tmp_path, device="gpu")
    said = sent(with_cards, configured(tmp_path, rest='[kernels]\ndevice = "gpu"'), name, folder)
    assert said == ""
    made = manifest(folder)
    assert (made.ranks, made.method["device"]) == (2, "cpu")
    assert made.method["why"], "the result says why no card"
    (tmp_path / "asks.py").write_text(
        "import os\nprint(*(os.environ.get(n) for n in ('SLURM_GPUS_PER_TASK', 'SLURMD_TRES_BIND')))\n"
    )
    text = (SCRIPTS / "reduce-gpu.sbatch").read_text()
    (tmp_path / "other.sbatch").write_text(
        text.replace("start_ranks mpi_kernels", "start_ranks asks").replace("check_run_folder", "true")
    )
    flags = ("--wait", "--ntasks=2", f"--output={tmp_path}/out", f"--export-file={environment_file(tmp_path)}")
    done = sbatch(with_cards, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "1 gpu:per_task:1\n" * 2


@pytest.mark.parametrize("script", ["reduce-gpu.sbatch", "pool.sbatch"])
def test_each_rank_gets_its_cards_where_sbatch_does_not_say_how_many(
    with_cards: Cluster, tmp_path: Path, script: str
) -> None:
    """sbatch of Slurm 26.05 sets no SLURM_GPUS_PER_TASK: the service says it."""
    (tmp_path / "asks.py").write_text("import os\nprint(os.environ.get('SLURMD_TRES_BIND'))\n")
    pool = tmp_path / "20240501T120000-00"
    pool.mkdir()
    for file in ("pool.json", "ended.json"):  # one life is enough
        (pool / file).touch()
    text = (SCRIPTS / script).read_text().replace("set -euo pipefail", "set -euo pipefail\nunset SLURM_GPUS_PER_TASK")
    text = re.sub(r"start_ranks mpi_kernels\S*", "start_ranks asks", text).replace("check_run_folder", "true")
    (tmp_path / "other.sbatch").write_text(text.replace("pool_folder=$1", f"pool_folder={pool}"))
    given = environment_file(tmp_path, EMFLOW_GPUS_PER_RANK="2")
    flags = ("--wait", "--ntasks=2", "--gpus-per-task=2", f"--output={tmp_path}/out", f"--export-file={given}")
    done = sbatch(with_cards, tmp_path, *flags)
    assert done.returncode == 0, (done.stderr, (tmp_path / "out").read_text())
    assert (tmp_path / "out").read_text() == "gpu:per_task:2\n" * 2


def environment_file(folder: Path, **more: str) -> Path:
    path = folder / "environment"
    values = {"PATH": os.environ["PATH"], "EMFLOW_PYTHON": sys.executable, "PYTHONPATH": str(folder)}
    values |= {"EMFLOW_SITE": str(SCRIPTS / "site.sh"), **more}
    path.write_bytes(b"".join(f"{key}={value}\0".encode() for key, value in values.items()))
    return path


def test_the_script_for_cards_runs_without_slurm_and_without_cards(tmp_path: Path) -> None:
    _, folder = run_folder(tmp_path, ranks=1, device="gpu")
    environment = {"PATH": os.environ["PATH"], "EMFLOW_PYTHON": sys.executable}
    command = ["bash", "--", str(SCRIPTS / "reduce-gpu.sbatch"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert manifest(folder).ranks == 1


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.s[bh]*")), ids=lambda path: path.name)
def test_bash_can_read_every_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_cards_where_there_are_none_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    found = submission(configured(tmp_path, rest='[kernels]\ndevice = "gpu"'))
    assert not found.ok
    assert "gres" in found.said.lower()


def test_a_script_that_can_not_find_its_site_says_so(cluster: Cluster, tmp_path: Path) -> None:
    _, folder = run_folder(tmp_path)
    environment = {"PATH": os.environ["PATH"], **cluster.environment}
    command = ["sbatch", "--wait", f"--output={tmp_path}/out", str(SCRIPTS / "reduce.sbatch"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment, check=False)
    assert done.returncode == 64
    assert "nodes must see emflow's own folder slurm" in (tmp_path / "out").read_text()
