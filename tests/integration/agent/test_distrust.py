"""Results that may not be believed never move the microscope: real kernels on real scans, then tampered with."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emflow.agent.protocol import Ending
from emflow.microscope import sidecar
from emflow.recipes import load_recipe
from emflow.records import acquisition_id, job_name
from emflow.runs import RunFolders
from mpi_kernels.contract import JobSpec, SourceSpec
from mpi_kernels.job import run
from mpi_kernels.ranks import Ranks

EXPERIMENT = "e0123456789ab"
DAY = "2024-02-29"


class Kernels:
    """The service's part, done by the test: reduce a scan aside, tamper with it, and put it where the agent looks."""

    def __init__(self, lab) -> None:
        self.lab = lab
        self.done: list[str] = []
        self.recipe = load_recipe("quick", relative_to=lab.folder)

    def next_scan(self, agent) -> Path:
        """The next scan that is whole."""

        def waiting() -> list[Path]:
            notes = sorted((self.lab.folder / "share").glob(f"*{sidecar.SUFFIX}"))
            scans = [n.with_name(n.name.removesuffix(sidecar.SUFFIX) + ".npy") for n in notes]
            return [s for s in scans if s.name not in self.done]

        self.lab.until(waiting, agent)
        (scan,) = waiting()
        self.done.append(scan.name)
        return scan

    def reduce(self, scan: Path, *, trace: str | None = None, digest: str | None = None) -> Path:
        """Run the real kernels aside; the acquisition's folder."""
        acquisition = acquisition_id("share", os.fsencode(scan.name), 0)
        runs = RunFolders(self.lab.folder / "aside")
        spec = JobSpec(
            job=job_name(acquisition, 1),
            acquisition=acquisition,
            trace=trace or scan.stem,
            recipe=self.recipe,
            source=SourceSpec(path=str(scan), format="mpi_kernels.formats.npy:Npy", digest=digest),
        )
        folder = runs.write_job(spec, DAY)
        run(folder, Ranks())
        return folder.parent

    def publish(self, folder: Path) -> None:
        """Let the agent see a result."""
        day = self.lab.runs / DAY
        day.mkdir(parents=True, exist_ok=True)
        folder.rename(day / folder.name)

    def good(self, scan: Path) -> None:
        self.publish(self.reduce(scan))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "01" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- each takes the kernels and a scan, and publishes something that may not be believed


def saturated(kernels: Kernels, scan: Path) -> None:
    data = np.load(scan)
    data[1, 2, 3, 4] = np.iinfo(data.dtype).max
    np.save(scan, data)
    kernels.good(scan)


def dark(kernels: Kernels, scan: Path) -> None:
    np.save(scan, np.zeros_like(np.load(scan)))
    kernels.good(scan)


def not_finite(kernels: Kernels, scan: Path) -> None:
    data = np.load(scan).astype(np.float32)
    data[0, 0] = np.nan
    np.save(scan, data)
    kernels.good(scan)


def forged_digest(kernels: Kernels, scan: Path) -> None:
    folder = kernels.reduce(scan)
    edit(folder, result_sha256="0" * 64)
    kernels.publish(folder)


def changed_file(kernels: Kernels, scan: Path) -> None:
    folder = kernels.reduce(scan)
    path = folder / "01" / "result.h5"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    kernels.publish(folder)


def of_another_command(kernels: Kernels, scan: Path) -> None:
    kernels.publish(kernels.reduce(scan, trace=f"{EXPERIMENT}-0077-00"))


def without_file(kernels: Kernels, scan: Path) -> None:
    folder = kernels.reduce(scan)
    (folder / "01" / "result.h5").unlink()
    kernels.publish(folder)


def no_hdf5(kernels: Kernels, scan: Path) -> None:
    import hashlib

    folder = kernels.reduce(scan)
    (folder / "01" / "result.h5").write_bytes(b"text")
    edit(folder, result_sha256=hashlib.sha256(b"text").hexdigest())
    kernels.publish(folder)


def partial(kernels: Kernels, scan: Path) -> None:
    folder = kernels.reduce(scan)
    edit(folder, partial=True, coverage=0.5)
    kernels.publish(folder)


def of_another_version(kernels: Kernels, scan: Path) -> None:
    folder = kernels.reduce(scan)
    edit(folder, v=99)
    kernels.publish(folder)


def no_text(kernels: Kernels, scan: Path) -> None:
    folder = kernels.reduce(scan)
    edit(folder, scalars={"pattern": {"\udc80": 1, "total": 1e999}})
    path = folder / "01" / "result.json"
    path.write_text(path.read_text().replace("Infinity", "1e999"))
    kernels.publish(folder)


def elsewhere(kernels: Kernels, scan: Path) -> None:
    folder = kernels.reduce(scan)
    edit(folder, result="../../../../etc/hosts")
    kernels.publish(folder)


def of_another_recipe(kernels: Kernels, scan: Path) -> None:
    """The service was given a recipe whose bright field is another one, under the same name."""
    first, *others = kernels.recipe.reductions
    narrow = replace(first, parameters=first.parameters | {"radius": 2.0})
    kernels.recipe = replace(kernels.recipe, reductions=(narrow, *others))
    kernels.good(scan)


BAD: dict[Callable[[Kernels, Path], None], str] = {
    saturated: "quality DOUBTFUL",
    dark: "quality INVALID",
    not_finite: "quality DOUBTFUL",
    forged_digest: "is not the file",
    changed_file: "is not the file",
    of_another_command: "it is of command",
    without_file: "No such file",
    no_hdf5: "no result file",
    partial: "only 50%",
    of_another_version: "version 99",
    elsewhere: "its manifest names",
    of_another_recipe: "makes bright_field otherwise",
    no_text: "holds what no log can",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_it_never_moves_the_microscope(make_lab, bad: Callable[[Kernels, Path], None]) -> None:
    lab = make_lab()
    lab.microscope()
    kernels = Kernels(lab)
    agent = lab.agent("--json")
    for _ in range(3):
        bad(kernels, kernels.next_scan(agent))
    assert agent.wait() == 1, agent.text()
    summary = json.loads(agent.text().splitlines()[-1])
    assert (summary["ending"], summary["acquisitions"]) == (Ending.GAVE_UP, 3)
    assert BAD[bad] in summary["reason"]
    decided = lab.decisions()
    assert [d.by for d in decided] == ["policy", "gate", "gate", "gate"]
    assert not any(d.decision.trusted for d in decided[1:])
    assert lab.began() == [f"{EXPERIMENT}-{n:04d}-00" for n in range(3)]  # three scans, no set
    with lab.client() as client:
        assert client.status().controls["C10_nm"] == 0.0
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout


def test_one_bad_result_is_acquired_again(make_lab) -> None:
    lab = make_lab()
    lab.microscope()
    kernels = Kernels(lab)
    agent = lab.agent("-p", "results=2", "--json")
    dark(kernels, kernels.next_scan(agent))
    for _ in range(2):
        kernels.good(kernels.next_scan(agent))
    assert agent.wait() == 0, agent.text()
    assert [d.by for d in lab.decisions()] == ["policy", "gate", "policy", "policy"]
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout


def test_an_older_result_under_the_name_of_the_new_scan(make_lab) -> None:
    """A result that was decided on, copied to where the next one is waited for."""
    lab = make_lab()
    lab.microscope()
    kernels = Kernels(lab)
    agent = lab.agent("--json")
    first = kernels.next_scan(agent)
    kernels.good(first)
    older = lab.runs / DAY / acquisition_id("share", os.fsencode(first.name), 0)
    for _ in range(3):
        scan = kernels.next_scan(agent)
        copied = lab.folder / "copied" / acquisition_id("share", os.fsencode(scan.name), 0)
        shutil.copytree(older, copied)
        kernels.publish(copied)
    assert agent.wait() == 1, agent.text()
    assert "but lies where" in lab.decisions()[-1].decision.reason
    sets = [i for i in lab.began() if i.endswith("0001-00")]
    assert len(lab.began()) == 5
    assert len(sets) == 1


def test_only_the_awaited_scan_counts(make_lab) -> None:
    """An attempt that fails is followed by one that counts; foreign results are not looked at."""
    lab = make_lab()
    lab.microscope()
    kernels = Kernels(lab)
    agent = lab.agent("-p", "results=1", "--json")
    scan = kernels.next_scan(agent)
    foreign = lab.folder / "share" / "foreign.npy"
    np.save(foreign, np.load(scan))
    kernels.good(foreign)
    folder = kernels.reduce(scan)
    (folder / "01").rename(folder / "02")
    (folder / "01").mkdir()
    edit_job = json.loads((folder / "02" / "result.json").read_text())
    edit_job["job"] = f"{folder.name}-02"
    (folder / "02" / "result.json").write_text(json.dumps(edit_job))
    time.sleep(0.1)
    assert len(lab.decisions()) == 1
    kernels.publish(folder)
    assert agent.wait() == 0, agent.text()
    assert [d.based_on for d in lab.decisions()] == [(), (f"{folder.name}-02",)]


def test_a_result_that_does_not_come(make_lab) -> None:
    lab = make_lab(result_timeout_s=0.5)
    lab.microscope()
    agent = lab.agent("--json")
    assert agent.wait() == 1, agent.text()
    summary = json.loads(agent.text().splitlines()[-1])
    assert summary["ending"] == "failed"
    assert "no result of" in summary["reason"]


@pytest.mark.parametrize(("option", "told"), [("nan=true", "nan is not a finite number"), ("fails=true", "as told")])
def test_a_policy_that_fails(lab, option: str, told: str) -> None:
    agent = lab.agent("-p", option, "--json")
    assert agent.wait() == 1, agent.text()
    summary = json.loads(agent.text().splitlines()[-1])
    assert summary["ending"] == "failed"
    assert told in summary["reason"]
    assert "stepping:Stepping" in summary["reason"]
    assert lab.began() == [f"{EXPERIMENT}-0000-00"]


def test_out_of_limits_is_the_end_and_names_the_limit(lab) -> None:
    agent = lab.agent("-p", "far=100000", "--json")
    assert agent.wait() == 1, agent.text()
    summary = json.loads(agent.text().splitlines()[-1])
    assert summary["ending"] == "gave up"
    assert "limits: " in summary["reason"]
    assert "C10_nm" in summary["reason"]
    with lab.client() as client:
        assert client.status().controls["C10_nm"] == 0.0
