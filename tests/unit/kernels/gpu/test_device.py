"""Which card a rank takes, and what is said where there is none; every reason in a process that really has it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_kernels.device import choose, local_rank
from mpi_kernels.gpu.card import CardError, open_card
from mpi_kernels.gpu.fused import GpuFused, attempt
from mpi_kernels.protocols import Masks, Sum

ASK = "from mpi_kernels.device import choose; import json; c = choose(); print(json.dumps([c.index, c.why]))"


def ask(folder: Path, before: str = "", **environment: str) -> list[Any]:
    """What another process chooses, with ``folder`` first on its path."""
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", f"{before}\n{ASK}"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_cpu_is_chosen_where_it_is_asked_for() -> None:
    assert (choose("cpu").index, choose("cpu").why) == (None, "asked for")


def test_without_cupy(tmp_path: Path) -> None:
    # None in sys.modules is how Python itself marks a module that is not to be found
    index, why = ask(tmp_path, "import sys; sys.modules['cupy'] = None")
    assert index is None
    assert why == "CuPy is not installed (extra gpu)"


def test_with_a_broken_cupy(tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise RuntimeError('built for another CUDA')\n")
    assert ask(tmp_path) == [None, "CuPy can't be imported: RuntimeError: built for another CUDA"]
    (tmp_path / "cupy.py").write_text("import no_such_part\n")
    assert ask(tmp_path) == [None, "CuPy can't be imported: No module named 'no_such_part'"]


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed: pip install emflow[gpu]")
def test_with_cupy_and_no_device(tmp_path: Path) -> None:
    index, why = ask(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert index is None
    assert why.startswith("no device (CUDA_VISIBLE_DEVICES='')")


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"SLURM_LOCALID": "3"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        ({"MPI_LOCALRANKID": "1", "PMI_RANK": "9"}, 1),
        ({"SLURM_LOCALID": "x", "PALS_LOCAL_RANKID": "4"}, 4),
    ],
)
def test_rank_on_the_node(environment: dict[str, str], rank: int) -> None:
    assert local_rank(environment) == rank


@pytest.mark.needs_mpi
def test_hydra_says_the_rank_on_the_node(mpiexec: str) -> None:
    code = "from mpi_kernels.device import local_rank; print(local_rank())"
    command = [mpiexec, "-n", "2", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.replace("\n", "")) == ["0", "1"]  # lines of two ranks may mix


def test_where_a_card_cannot_the_reason_is_returned(gpu: SimpleNamespace) -> None:
    data = np.zeros((100, 4, 5), np.uint16)
    header = gpu.header(data)
    big = Masks(np.full((1, 4, 5), 2**50))

    class Refusing(type(gpu.card())):  # type: ignore[misc]
        def build(self, options: tuple[str, ...]) -> Any:
            raise CardError("nvrtc: error: invalid value for --gpu-architecture")

    reach = 65535 * 20 * 2**50
    cases = [
        (Sum(), None, "no device"),
        (Sum(), gpu.card(capacity=100), "a CPU: no room for 64 frames"),
        (big, gpu.card(), f"a weighted sum of a frame can reach {reach}, more than int64 holds"),
        (Sum(), Refusing(None), "nvrtc: error: invalid value for --gpu-architecture"),
    ]
    for term, card, reason in cases:
        assert attempt([term], header, 100, card, "no device") == reason
    found = attempt([Sum()], header, 100, gpu.card(), "device 0")
    assert isinstance(found, GpuFused)
    assert found.method == "a CPU, blocks of 128 frames"


def test_opening_a_card_never_fails() -> None:
    card, why = open_card()
    assert why
    assert (card is None) == (choose().index is None)
    assert open_card("cpu") == (None, "asked for")
