"""Quantum Detectors Merlin: .mib frames, each behind its own text header, and the .hdr of the acquisition."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from mpi_kernels.contract import Header, Kind, Scalar
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats import merlin_raw, merlin_series
from mpi_kernels.formats.access import (
    check_caps,
    expect_size,
    member,
    read_at,
    read_sidecar,
    size_of,
    starts_like,
)
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

MAGIC = b"MQ1"
_PIXELS = {"U08": "|u1", "U16": ">u2", "U32": ">u4"}
_FIELDS = re.compile(rb"MQ1,(\d{6,10}),(\d{5}),(\d{2}),(\d{4,5}),(\d{4,5}),([A-Z]\d\d),\s*(\d+x\d+)G?,")
_DEPTH = re.compile(rb"MQ1A,[^,]*,[^,]*,(\d+)")
HEADER_LIMIT = 1 << 14

FRAMES = "Frames in Acquisition (Number)"
PER_TRIGGER = "Frames per Trigger (Number)"
_FACTS = {
    "Time and Date Stamp (day, mnth, yr, hr, min, s)": "date",
    "Chip ID": "chips",
    "Chip Mode  (SPM, CSM, CM, CSCM)": "chip_mode",
    "Counter Depth (number)": "counter_depth",
    "Gain": "gain",
    "Gap Fill Mode": "gap_fill_mode",
    "Flat Field File": "flat_field_file",
    "Sensor Bias (V)": "sensor_bias",
    "Software Version": "merlin_software",
}


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a frame header says: ``shape`` is (rows, columns) as the file has them."""

    lead: int
    chips: int
    shape: tuple[int, int]
    code: str
    depth: int
    number: int


class Merlin:
    r"""Merlin's .mib.

    Layout: each frame is an ASCII header ``MQ1,sequence,header bytes,chips,columns,rows,type,layout,...`` of 384
    bytes (one chip) or 768 (four), its length in field 3, then ``rows x columns`` pixels: U08, U16, U32 big-endian,
    or R64, the chips' own bits (`merlin_raw`).  A region of interest has fewer rows.  Frames are delivered in file
    order; HyperSpy's reader flips det_y.  ``<stem>.hdr`` describes the acquisition, a line ``name:\tvalue`` each, and
    ends with ``End``; ``...RAW.mib`` has none.  Source: Merlin Detector Interface manual, "MQ1 header"; R64 as read by
    LiberTEM ``io/dataset/mib.py`` and compared with real files.

    Complete when the size is that of "Frames in Acquisition" of the .hdr.  Without .hdr, or with 0 frames there
    (endless), the number of frames is what the size gives and the rule is stability.  The Merlin software writes the
    .hdr before the first frame.

    A series in several files, ``<stem><number>.mib`` with one ``<stem>.hdr``, is read through its first file
    (`merlin_series`).

    The scan shape is ``ScanY, ScanX`` of the .hdr (software 1.5), else one row per trigger if that divides the
    frames; else it is a stack and the recipe's ``scan_shape`` makes it a scan.  One frame more in each row than ScanX
    (line skip) is the flyback's, and is left out with a warning.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".mib",)

    def probe(self, path: str) -> Header:
        """Read the first frame's header and the .hdr."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return LayoutSource(*_probe(path))

    def probe_growing(self, path: str) -> Header:
        """Read the .hdr and the first frame's header; the size may still be less."""
        return _probe(path, growing=True)[0]

    def open_growing(self, path: str) -> Source:
        """Open it while it is written, frame after frame."""
        return LayoutSource(*_probe(path, growing=True))


def _probe(path: str, *, growing: bool = False) -> tuple[Header, Layout]:
    size = size_of(path)
    frame = _frame(path)
    plan, det_shape, dtype, warnings = _plan(path, frame)
    check_caps(path, 1, plan.record)
    parts, hdr_path = merlin_series.parts(path)
    hdr = _hdr(hdr_path) if hdr_path else {}
    announced = _count(hdr, FRAMES, hdr_path)
    if growing and (len(parts) > 1 or not announced):
        told = "it is in several files" if len(parts) > 1 else "no .hdr says how many frames there will be"
        raise Incomplete(f"it can't be read while it grows: {told}", path=path, next_step="wait until it is complete")
    if len(parts) > 1:
        plan, frames = merlin_series.joined(plan, parts, announced)
    else:
        frames = announced or size // plan.record
        check_caps(path, max(1, frames), plan.record)
        # without an announced number, a started frame must still be finished
        expect_size(path, size, 0, plan.record, frames if announced else -(-size // plan.record), growing=growing)
    kind, scan_shape = _scan(hdr, frames, hdr_path)
    skipped = merlin_series.without_flyback(
        plan, (_count(hdr, "ScanY", hdr_path), _count(hdr, "ScanX", hdr_path)), frames
    )
    if skipped is not None:
        plan, kind, scan_shape = skipped.layout, "4d", skipped.scan_shape
        warnings = (*warnings, skipped.warning)
    members = [member(p, merlin_series.suffix(p, parts)) for p in parts]
    header = Header(
        format="merlin",
        kind=kind,
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=dtype,
        members=(*members, *((member(hdr_path, ".hdr"),) if hdr_path else ())),
        rule="exact" if announced else "stability",
        metadata=_facts(hdr, frame),
        warnings=warnings,
    )
    return header, plan


def _frame(path: str) -> _Frame:
    head = read_at(path, 0, HEADER_LIMIT)
    starts_like(head[:3], MAGIC, path, "Merlin")
    found = _FIELDS.match(head)
    if found is None:
        if len(head) < 384:
            raise Incomplete(f"only {len(head)} bytes of the first frame are there", path=path, next_step="wait")
        raise FormatError("its first frame header can't be read", path=path, next_step="copy the file again")
    lead, chips, columns, rows = (int(found[i]) for i in (2, 3, 4, 5))
    if not found.end() <= lead <= HEADER_LIMIT or min(chips, columns, rows) < 1:
        raise FormatError(
            f"a frame header of {lead} bytes for {columns} x {rows} pixels of {chips} chips can't be",
            path=path,
            next_step="copy the file again",
        )
    if len(head) < lead:
        raise Incomplete(
            f"{len(head)} of {lead} bytes of the first frame header are there", path=path, next_step="wait"
        )
    depths = _DEPTH.findall(head[:lead])
    depth = int(depths[-1]) if depths else 0
    return _Frame(lead, chips, (rows, columns), found[6].decode(), depth, number=int(found[1]))


def _plan(path: str, frame: _Frame) -> tuple[Layout, tuple[int, int], str, tuple[str, ...]]:
    """Plan, detector shape, delivered dtype and warnings."""
    rows, columns = frame.shape
    if frame.code in _PIXELS:
        dtype = _PIXELS[frame.code]
        payload = rows * columns * int(dtype[-1])
        plan = Layout(files=(path,), lead=frame.lead, payload=payload, dtype=dtype, magic=MAGIC, numbered=frame.number)
        return plan, frame.shape, f"uint{frame.code[1:].lstrip('0')}", ()
    if frame.code != "R64":
        raise FormatError(
            f"pixels of type {frame.code} are not known",
            path=path,
            next_step="set the file format to U08, U16, U32 or R64 (raw)",
        )
    layout = merlin_raw.layout(frame.chips, rows, frame.depth, path)
    plan = Layout(
        files=(path,),
        lead=frame.lead,
        payload=layout.payload,
        dtype="|u1",
        magic=MAGIC,
        numbered=frame.number,
        decode="mpi_kernels.formats.merlin_raw:decode",
        decode_with={"chips": frame.chips, "rows": rows, "depth": frame.depth},
    )
    return plan, layout.det_shape, layout.dtype, layout.warnings


def _hdr(path: str) -> dict[str, str]:
    lines = read_sidecar(path).decode("latin-1").splitlines()
    if not lines or not lines[0].startswith("HDR"):
        raise FormatError("it is no Merlin header: HDR is not its first word", path=path, next_step="remove it")
    if not any(line.startswith("End") for line in lines):
        raise Incomplete("its End line is not written yet", path=path, next_step="wait")
    pairs = (line.split("\t", 1) for line in lines[1:] if "\t" in line)
    return {name.rstrip(":"): value.strip() for name, value in pairs}


def _count(hdr: dict[str, str], name: str, path: str | None) -> int:
    """A number of the .hdr; 0 where it is absent."""
    text = hdr.get(name, "0")
    if not re.fullmatch(r"\d{1,12}", text):
        raise FormatError(f"{name!r} is {text!r:.80}", path=path, next_step="copy the .hdr again")
    return int(text)


def _scan(hdr: dict[str, str], frames: int, path: str | None) -> tuple[Kind, tuple[int, ...]]:
    rows, columns = _count(hdr, "ScanY", path), _count(hdr, "ScanX", path)
    if rows and columns and rows * columns == frames:
        return "4d", (rows, columns)
    row = _count(hdr, PER_TRIGGER, path)
    if 1 < row < frames and frames % row == 0:
        return "4d", (frames // row, row)
    return "stack", (frames,)


def _facts(hdr: dict[str, str], frame: _Frame) -> dict[str, Scalar]:
    facts: dict[str, Scalar] = {"pixel_type": frame.code, "chips_used": frame.chips}
    facts.update({ours: hdr[theirs][:256] for theirs, ours in _FACTS.items() if hdr.get(theirs)})
    return facts
