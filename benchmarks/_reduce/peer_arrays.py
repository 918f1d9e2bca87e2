"""h5py, stempy and py4DSTEM, kept warm: each run in an environment that has it, one JSON line for each answer.

``python -m benchmarks._reduce.peer_arrays {h5py,stempy,py4dstem} MASKS.npy RINGS.npy``.
h5py only reads: all frames, in slabs of whole chunks, into one buffer.  stempy gets frames that lie in memory as arrays
already.  py4DSTEM gets a memory-mapped cube.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._reduce.checks import Check, digest

IN_MEMORY: dict[str, np.ndarray] = {}
"""The one array that stempy has, by path."""

Answer = tuple[float, dict[str, Check]]


def read_h5py(request: dict[str, Any], masks: np.ndarray, rings: np.ndarray) -> Answer:  # noqa: ARG001
    """Read a data set of any number of axes, 32 frames at a time."""
    import h5py

    if request.get("plugins"):
        import hdf5plugin  # noqa: F401
    begin = time.perf_counter()
    with h5py.File(request["path"], "r") as file:
        data = file["data"]
        buffer = np.empty((32, *data.shape[2:]), data.dtype)
        last = 0
        for row in range(data.shape[0]):
            for at in range(0, data.shape[1], 32):
                data.read_direct(buffer, np.s_[row, at : at + 32])
                last += int(buffer[-1, -1, -1])
    return time.perf_counter() - begin, {}


def stempy_images(request: dict[str, Any], masks: np.ndarray, rings: np.ndarray) -> Answer:  # noqa: ARG001
    """Virtual images of frames in memory; loading them is not timed."""
    from stempy import image

    if request["path"] not in IN_MEMORY:
        IN_MEMORY.clear()
        IN_MEMORY[request["path"]] = np.load(request["path"])
    data = IN_MEMORY[request["path"]]
    scan, det = data.shape[:2], data.shape[2:]
    wide = request["recipe"] == "masks"
    inner, outer = ([0, 16, 32, 0], [16, 32, 56, 1000]) if wide else ([0], [16])
    frames, centre = data.reshape(-1, *det), tuple((n - 1) / 2 for n in det[::-1])
    begin = time.perf_counter()
    images = image.create_stem_images(frames, inner, outer, scan_dimensions=scan[::-1], center=centre)
    seconds = time.perf_counter() - begin
    # its rings take in other pixels at their edges; the image of everything does not depend on that
    return seconds, {"total": digest(images[3])} if wide else {}


def py4dstem_fused(request: dict[str, Any], masks: np.ndarray, rings: np.ndarray) -> Answer:  # noqa: ARG001
    """Sum, largest value, virtual images and centre of mass of a cube, each by its own method."""
    import py4DSTEM

    cube = py4DSTEM.DataCube(data=np.load(request["path"], mmap_mode="r"))
    begin = time.perf_counter()
    total = cube.get_dp_mean(returncalc=True).data * np.prod(cube.data.shape[:2])
    largest = cube.get_dp_max(returncalc=True).data
    images = [
        cube.get_virtual_image(mode="mask", geometry=m.astype(np.float32), name=f"m{i}", returncalc=True).data
        for i, m in enumerate(masks[:3])
    ]
    seconds = time.perf_counter() - begin
    checks = {"sum": digest(total), "max": digest(largest), "masks 3": digest(np.stack(images, axis=-1))}
    return seconds, checks


PEERS: dict[str, Callable[[dict[str, Any], np.ndarray, np.ndarray], Answer]] = {
    "h5py": read_h5py,
    "stempy": stempy_images,
    "py4dstem": py4dstem_fused,
}


def main() -> None:
    """Answer until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is not taken for an answer
    run, masks, rings = PEERS[sys.argv[1]], np.load(sys.argv[2]), np.load(sys.argv[3])
    for line in sys.stdin:
        try:
            seconds, checks = run(json.loads(line), masks, rings)
            told: dict[str, Any] = {"seconds": seconds, "checks": checks}
        except Exception as error:  # noqa: BLE001  the benchmark decides what a failure means
            told = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(told) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
