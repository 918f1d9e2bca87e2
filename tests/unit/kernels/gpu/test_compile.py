"""The kernels compile for real cards, which needs neither a card nor a driver."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mpi_kernels.contract import Header
from mpi_kernels.gpu.card import KERNELS
from mpi_kernels.gpu.program import KERNEL, PIXEL_OPTIONS, Program
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Sum, SumSq
from mpi_kernels.terms import unique


def options(dtype: str) -> list[tuple[str, ...]]:
    """What a recipe with every kind of term asks the compiler for."""
    det = (16, 16)
    header = Header(
        format="memory", kind="stack", scan_shape=(9,), det_shape=det, dtype=dtype, members=(), rule="exact"
    )
    half = np.random.default_rng(0).random((1, *det)) < 0.5
    labels = np.zeros(det, np.int32)
    wanted = (Sum(), SumSq(), Max(), Moments(), Masks(half), Masks(half * 1.5), Labels(labels, 1))
    if dtype == "float32":
        wanted = (Sum(), SumSq(np.ones(det)), *wanted[2:])
    narrow = Program(unique(wanted), header)
    wide = Program(unique([Masks(half * (1 << 20))]), header)
    return [p.options for p in (*narrow.passes, *wide.passes)]


def compiled(library: Path, source: bytes, flags: list[str]) -> bytes:
    """Make PTX, the assembly of a family of cards."""
    nvrtc = ctypes.CDLL(str(library))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None) == 0
    given = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), given)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    assert not log.value.strip(), log.value.decode()  # no warning either
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value


@pytest.mark.needs_nvrtc
@pytest.mark.parametrize("dtype", PIXEL_OPTIONS)
def test_nvrtc_compiles_every_kernel_without_a_warning(nvrtc: Path, dtype: str) -> None:
    for architecture, one in zip(itertools.cycle(("compute_90", "compute_75", "compute_80")), options(dtype)):
        ptx = compiled(nvrtc, KERNEL.read_bytes(), [*one, f"--gpu-architecture={architecture}"])
        for name in KERNELS:
            assert f".entry {name}(".encode() in ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PIXEL_OPTIONS)
def test_nvcc_assembles_every_kernel(dtype: str, tmp_path: Path) -> None:
    """Down to machine code: registers and shared memory suffice, and nothing is spilled to memory."""
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc: install the CUDA toolkit")
    for one in options(dtype):
        command = [nvcc, "-cubin", "-arch=sm_90", "-Xptxas", "-v", *one, str(KERNEL), "-o", str(tmp_path / "k")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spills = [line for line in done.stderr.splitlines() if "spill" in line]
        assert spills
        assert all(" 0 bytes spill stores, 0 bytes spill loads" in line for line in spills), done.stderr


def test_kernels_name_all_entries() -> None:
    text = KERNEL.read_text(encoding="ascii")
    assert text.count('extern "C" __global__') == len(KERNELS)
