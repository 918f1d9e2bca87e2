"""Exact scans written as detectors write them: row by row, in each format that emflow reads.

Frames are appended to .npy, .raw and .mib; an .h5 file gets its full size first and stays open meanwhile, as Nion
Swift keeps it.  Merlin's .hdr comes before the first frame, all other sidecars after the last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import numpy as np

from emflow.synthetic_hdf5 import (
    write_dectris,
    write_emd,
    write_hspy,
    write_nion_h5,
    write_nxdata,
    write_stempy,
    write_topspin,
)
from emflow.synthetic_pace import AT_ONCE, ByteOrder, Pace, blocks, properties
from mpi_kernels.exact import ExactScan, disc
from mpi_kernels.formats.merlin_raw import encode


def _append(file: IO[bytes], scan: ExactScan, pace: Pace, stored: np.dtype) -> None:
    for start, stop in blocks(scan, pace):
        file.write(scan.frames(start, stop).astype(stored).tobytes())
        file.flush()


def write_npy(
    scan: ExactScan,
    path: Path,
    *,
    pace: Pace = AT_ONCE,
    byte_order: ByteOrder = "=",
    fortran: bool = False,
    sidecar: bool = True,
) -> Path:
    """A .npy file, and Swift's .json beside it unless ``sidecar`` is False; Fortran order is written at once."""
    stored = scan.dtype.newbyteorder(byte_order)
    shape = (*scan.scan_shape, *scan.det_shape)
    if sidecar:
        # before the array is whole, or a reader that is quick would take the array without it
        path.with_suffix(".json").write_text(json.dumps(properties(scan)))
    with path.open("wb") as file:
        described = {"descr": stored.str, "fortran_order": fortran, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        file.flush()
        if fortran:
            file.write(scan.frames(0, scan.count).reshape(shape).astype(stored).tobytes("F"))
        else:
            _append(file, scan, pace, stored)
    return path


def write_raw(
    scan: ExactScan,
    path: Path,
    *,
    pace: Pace = AT_ONCE,
    byte_order: ByteOrder = "=",
    offset: int = 0,
    fortran: bool = False,
) -> Path:
    """A .raw file and, when it is whole, its sidecar .json."""
    stored = scan.dtype.newbyteorder(byte_order)
    shape = (*scan.scan_shape, *scan.det_shape)
    with path.open("wb") as file:
        file.write(b"\xa5" * offset)
        if fortran:
            file.write(scan.frames(0, scan.count).reshape(shape).astype(stored).tobytes("F"))
        else:
            _append(file, scan, pace, stored)
    described = {"shape": list(shape), "dtype": stored.str, "order": "F" if fortran else "C", "offset": offset}
    path.with_suffix(".json").write_text(json.dumps(described))
    return path


def write_merlin(
    scan: ExactScan, path: Path, *, pace: Pace = AT_ONCE, hdr: bool = True, raw_depth: int = 0, chips: int = 1
) -> Path:
    """A Merlin .mib file of uint8, uint16 or uint32 counts, and its .hdr before the first frame.

    ``raw_depth`` 1, 6, 12 or 24 writes R64 instead, for detectors of 256 columns a chip; the counts must fit.
    """
    if scan.dtype.kind != "u" or scan.dtype.itemsize > 4:
        raise ValueError(f"Merlin stores no {scan.dtype}")
    bits = 8 * scan.dtype.itemsize
    (rows, columns), code = scan.det_shape, "R64" if raw_depth else f"U{bits:02d}"
    if raw_depth and chips == 4:
        rows, columns = rows // 2, columns * 2  # the four chips side by side
    if hdr:
        path.with_suffix(".hdr").write_text(_hdr(scan, raw_depth or {8: 6, 16: 12, 32: 24}[bits]), newline="")
    lead = 384 if chips == 1 else 768
    layout = "   1x1" if chips == 1 else "   2x2"
    with path.open("wb") as file:
        for start, stop in blocks(scan, pace):
            frames = scan.frames(start, stop)
            stored = encode(frames, chips, raw_depth) if raw_depth else frames.astype(scan.dtype.newbyteorder(">"))
            for i, frame in enumerate(stored, start):
                text = (
                    f"MQ1,{i + 1:06d},{lead:05d},{chips:02d},{columns:04d},{rows:04d},{code},{layout},01,"
                    f"2024-01-01 12:00:00.000000,0.001000,0,0,0,MQ1A,2024-01-01T12:00:00.000000000Z,1000000ns,"
                    f"{raw_depth or bits},"
                )
                file.write(text.encode("ascii").ljust(lead, b"\0") + frame.tobytes())
            file.flush()
    return path


def _hdr(scan: ExactScan, depth: int) -> str:
    row = scan.scan_shape[-1] if len(scan.scan_shape) == 2 else 1
    lines = {
        "Time and Date Stamp (day, mnth, yr, hr, min, s)": "01/01/2024 12:00:00",
        "Counter Depth (number)": depth,
        "Frames in Acquisition (Number)": scan.count,
        "Frames per Trigger (Number)": row,
        "Software Version": "1.5.0.197",
    }
    text = "".join(f"{name}:\t{value}\r\n" for name, value in lines.items())
    if len(scan.scan_shape) == 2:
        text += f"ScanX:\t{scan.scan_shape[1]}\r\nScanY:\t{scan.scan_shape[0]}\r\n"
    return f"HDR,\t\r\n{text}End\t" + " " * 100


def write_empad(scan: ExactScan, path: Path, *, pace: Pace = AT_ONCE, xml: str | None = None) -> Path:
    """An EMPAD .raw file of 128 x 128 float32 frames and, when it is whole, its XML (named ``xml``, or by the stem)."""
    if scan.det_shape != (128, 128) or scan.dtype != np.float32:
        raise ValueError("EMPAD frames are 128 x 128 float32")
    with path.open("wb") as file:
        for start, stop in blocks(scan, pace):
            padded = np.full((stop - start, 130, 128), 1e6, "<f4")
            padded[:, :128] = scan.frames(start, stop)
            file.write(padded.tobytes())
            file.flush()
    if len(scan.scan_shape) == 2:
        size = f"<pix_x>{scan.scan_shape[1]}</pix_x><pix_y>{scan.scan_shape[0]}</pix_y>"
    else:
        size = f"<scan_parameters><series_count>{scan.count}</series_count></scan_parameters>"
    angle = "<iom_measurements><calibrated_diffraction_angle>0.001</calibrated_diffraction_angle></iom_measurements>"
    text = f'<root name="synthetic">{size}<raw_file filename="{path.name}"/>{angle}</root>'
    (path.with_name(xml) if xml else path.with_suffix(".xml")).write_text(text)
    return path


__all__ = [
    "AT_ONCE",
    "ExactScan",
    "Pace",
    "blocks",
    "disc",
    "properties",
    "write_dectris",
    "write_emd",
    "write_empad",
    "write_hspy",
    "write_merlin",
    "write_nion_h5",
    "write_npy",
    "write_nxdata",
    "write_raw",
    "write_stempy",
    "write_topspin",
]
