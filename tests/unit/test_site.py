"""Profiles and requests: what wins, where it was said, and what never becomes an option or code."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from emflow.config import Config, load
from emflow.config_tables import SiteKeys, SlurmSettings
from emflow.errors import ConfigError
from emflow.records import Resources
from emflow.schedulers import site

SHIPPED = ("frontier", "generic", "perlmutter", "workstation")


def configured(folder: Path, slurm: str = "", rest: str = "") -> Config:
    path = folder / "emflow.toml"
    path.write_text(f'[[watch]]\nroot = "share"\n[slurm]\n{slurm}\n{rest}\n')
    return load(path)


def flags(folder: Path, slurm: str = "", rest: str = "", **resources: int) -> tuple[str, ...]:
    return site.request(configured(folder, slurm, rest), Resources(**resources)).flags


def test_the_profiles_that_the_configuration_names_are_shipped() -> None:
    assert site.site_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_profile_loads_and_says_what_it_rests_on(tmp_path: Path, name: str, device: str) -> None:
    config = configured(tmp_path, f'site = "{name}"', f'[kernels]\ndevice = "{device}"')
    found = site.settings(config)
    assert found.mpi
    assert bool(found.gpus_per_rank) == (device == "gpu")
    request = site.request(config, Resources(ranks=4))
    assert request.script.name == ("reduce-gpu.sbatch" if device == "gpu" else "reduce.sbatch")
    assert request.script.is_file()
    text = site.profile_path(config).read_text()
    assert "Tried on" in text or "NOT TRIED" in text
    assert "file system" in text.lower() or "local disk" in text


def test_the_configuration_wins_over_the_profile_and_flags_add_up(tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "mine.toml").write_text(
        'account = "a"\nqos = "q"\nflags = ["--licenses=x"]\nsetup = "mine.sh"\nmemory = "2 GiB"\n'
        '[gpu]\nqos = "gpu"\nflags = ["--gpu-bind=closest"]\n'
    )
    own = 'site = "sites/mine.toml"\naccount = "b"\nflags = ["--nice=5"]'
    found = site.resolve(configured(tmp_path, own, '[kernels]\ndevice = "gpu"'))
    assert found.settings.account == "b"
    assert found.settings.qos == "gpu"
    assert found.settings.flags == ("--licenses=x", "--gpu-bind=closest", "--nice=5")
    assert found.settings.setup == str(tmp_path / "sites" / "mine.sh")
    assert found.settings.memory == 2 << 30
    assert found.settings.gpus_per_rank == 1
    assert found.origins == {
        "account": "emflow.toml",
        "qos": "profile mine, [gpu]",
        "setup": "profile mine",
        "memory": "profile mine",
        "flags": "profile mine + profile mine, [gpu] + emflow.toml",
        "gpus_per_rank": '[kernels] device = "gpu"',
    }
    on_cpus = site.settings(configured(tmp_path, own))
    assert (on_cpus.qos, on_cpus.gpus_per_rank, on_cpus.flags) == ("q", 0, ("--licenses=x", "--nice=5"))


def test_a_profile_may_have_every_key_of_the_table_but_two() -> None:
    keys = {field.name for field in msgspec.structs.fields(SlurmSettings)}
    assert keys - set(SiteKeys.__struct_fields__) == {"site", "warn_s"}
    profile = {f.name: (f.type, f.default) for f in msgspec.structs.fields(SiteKeys)}
    table = {f.name: (f.type, f.default) for f in msgspec.structs.fields(SlurmSettings)}
    assert profile == {name: table[name] for name in profile}


def test_a_request_in_full(tmp_path: Path) -> None:
    own = (
        'site = "generic"\naccount = "m1"\npartition = "live"\nqos = "q"\nconstraint = "cpu&nvme"\n'
        'reservation = "beam"\nnodes = 2\ncpus_per_rank = 3\ngpus_per_rank = 1\nmemory = "1500 MB"\n'
        'flags = ["--licenses=scratch"]\nwarn_s = 30'
    )
    assert flags(tmp_path, own, ranks=4, time_limit_s=90061) == (
        "--account=m1",
        "--partition=live",
        "--qos=q",
        "--constraint=cpu&nvme",
        "--reservation=beam",
        "--nodes=2",
        "--ntasks=4",
        "--cpus-per-task=3",
        "--gpus-per-task=1",
        "--mem=1431M",
        "--time=1-01:01:01",
        "--signal=USR1@30",
        "--licenses=scratch",
    )
    assert flags(tmp_path, 'site = "generic"', ranks=2) == ("--ntasks=2", "--time=0-01:00:00", "--signal=USR1@60")


def test_memory_of_one_attempt_wins(tmp_path: Path) -> None:
    assert "--mem=4096M" in flags(tmp_path, 'memory = "1 GiB"', memory_mib=4096)


@pytest.mark.parametrize(("limit_s", "warn_s", "asked"), [(3600, 60, 60), (240, 300, 60), (120, 60, 0), (3600, 0, 0)])
def test_nobody_is_warned_in_the_first_half_of_the_time(tmp_path: Path, limit_s: int, warn_s: int, asked: int) -> None:
    """Slurm may signal a minute early, and ranks that just begin would take it for their end."""
    found = [flag for flag in flags(tmp_path, f"warn_s = {warn_s}", time_limit_s=limit_s) if "signal" in flag]
    assert found == ([f"--signal=USR1@{asked}"] if asked else [])


def test_a_pool_asks_for_its_own_time_and_script(tmp_path: Path) -> None:
    config = configured(tmp_path, rest="[pool]\nwalltime_s = 7200\n[scheduler]\nranks = 8")
    request = site.pool_request(config, "emflow-pool-1")
    assert request.flags[:1] == ("--job-name=emflow-pool-1",)
    assert {"--ntasks=8", "--time=0-02:00:00"} <= set(request.flags)
    assert request.script.name == "pool.sbatch"


@pytest.mark.parametrize("asked", [0, 2])
def test_scripts_are_told_how_many_cards_a_rank_has(tmp_path: Path, asked: int) -> None:
    config = configured(tmp_path, f"gpus_per_rank = {asked}")
    for request in (site.request(config, Resources()), site.pool_request(config)):
        assert request.environment.get("EMFLOW_GPUS_PER_RANK") == (str(asked) if asked else None)


def test_a_job_gets_nothing_of_our_environment_but_what_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SECRET_TOKEN", "SBATCH_ACCOUNT", "DISPLAY", "LD_PRELOAD", "PYTHONPATH"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PATH", "/opt/slurm/bin:/usr/bin")
    monkeypatch.setenv("USER", "emflow")
    environment = site.request(configured(tmp_path), Resources()).environment
    assert set(environment) <= {*site.INHERITED, "EMFLOW_PYTHON", "EMFLOW_SITE", "EMFLOW_MPI"}
    assert environment["PATH"] == "/opt/slurm/bin:/usr/bin"
    assert environment["EMFLOW_PYTHON"] == sys.executable
    assert Path(environment["EMFLOW_SITE"]).is_file()


def test_a_container_is_one_setting(tmp_path: Path) -> None:
    environment = site.request(configured(tmp_path, 'container = "images/em.sif"'), Resources()).environment
    assert environment["EMFLOW_CONTAINER"] == str(tmp_path / "images" / "em.sif")
    assert environment["EMFLOW_PYTHON"] == "python3"
    assert environment["EMFLOW_BIND"] == f"{tmp_path / 'runs'}:{tmp_path / 'pool'}"
    assert environment["EMFLOW_BIND_RO"] == f"{tmp_path}:{tmp_path / 'share'}"


def test_a_folder_that_a_container_can_not_be_given(tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    with pytest.raises(ConfigError, match="has a colon or a comma"):
        site.request(configured(folder, 'container = "em.sif"'), Resources())


@pytest.mark.parametrize(
    "flag",
    [
        "--wrap=touch owned",
        "--wra=touch owned",
        "--export=ALL",
        "--exp=ALL",
        "--export-file=/etc/passwd",
        "--job-name=x",
        "--job=x",
        "--output=/etc/passwd",
        "--uid=0",
        "--requeue",
        "--signal=KILL@1",
        "--array=1-9",
        "-o/etc/passwd",
        "-A x",
        "scratch",
        "--",
        "--Wrap=x",
        "--licenses x",
    ],
)
def test_flags_that_are_not_for_a_person_to_set(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match="flags"):
        site.settings(configured(tmp_path, f'flags = ["{flag}"]'))


@pytest.mark.parametrize("key", ["account", "partition", "setup", "mpi", "container"])
def test_values_that_are_no_plain_text(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} of \\[slurm\\]"):
        site.settings(configured(tmp_path, f'{key} = "a\\nb"'))
    with pytest.raises(ConfigError, match=f"{key} of \\[slurm\\]"):
        site.settings(configured(tmp_path, f'{key} = "a\\u001b[2Jb"'))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("perlmuter", None, "did you mean 'perlmutter'"),
        ("none.toml", None, "no such file"),
        ("mine.toml", "warn_s = 1", "mine.toml:1: unknown key 'warn_s'"),
        ("mine.toml", "\n[gpu]\nqoss = 1", "mine.toml:3: unknown key 'qoss' in [gpu]; did you mean 'qos'?"),
        ("mine.toml", 'memory = "lots"', "mine.toml:1: memory"),
    ],
)
def test_a_profile_that_is_wrong_is_named_with_its_line(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        site.settings(configured(tmp_path, f'site = "{name}"'))
    assert says in str(caught.value)
