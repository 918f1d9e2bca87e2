"""Exact scans as microscope makers' programs write them, whole and at once: for tests of the formats."""

from __future__ import annotations

import itertools
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from emflow.synthetic_pace import ByteOrder, properties
from mpi_kernels.exact import ExactScan

_DM_TYPES = {"int16": 1, "float32": 2, "uint8": 6, "int32": 7, "int8": 9, "uint16": 10, "uint32": 11, "float64": 12}
_SER_TYPES = {"uint8": 1, "uint16": 2, "uint32": 3, "int8": 4, "int16": 5, "int32": 6, "float32": 7, "float64": 8}
_MRC_MODES = {"int8": 0, "int16": 1, "float32": 2, "uint16": 6, "float16": 12}


def _all(scan: ExactScan, order: ByteOrder = "<") -> np.ndarray:
    return scan.frames(0, scan.count).astype(scan.dtype.newbyteorder(order))


def write_blo(scan: ExactScan, path: Path) -> Path:
    """A NanoMEGAS block file: square uint8 frames of a 4D scan."""
    (rows, columns), (side, _) = scan.scan_shape, scan.det_shape
    start = 0x1000 + -(-rows * columns // 16) * 16
    head = struct.pack(
        "<8sIIIHHHHHddIHId", b"IMGBLO\x02\x01", 0x1000, start, 131141, side, 0, columns, rows, 250,
        2.0, 2.5, 200_000, 50, 1000, 0.0,
    )  # fmt: skip
    frames = (struct.pack("<2sI", b"\xaa\x55", i) + f.tobytes() for i, f in enumerate(_all(scan)))
    path.write_bytes(head.ljust(start, b"\0") + b"".join(frames))
    return path


def write_tvips(scan: ExactScan, path: Path, *, parts: Sequence[int] = (), version: int = 2, lead: int = 64) -> Path:
    """A TVIPS stream ``<stem>_000.tvips``; ``parts`` are the frames at which further parts begin."""
    rows, columns = scan.det_shape
    lead = 12 if version == 1 else lead
    head = struct.pack("<13I", 256, version, columns, rows, 8 * scan.dtype.itemsize, 0, 0, 2, 2, 3, 300_000, 80, lead)
    frames = [struct.pack("<III", i, 0, 0).ljust(24, b"\0") + struct.pack("<I", 2) for i in range(scan.count)]
    stored = [f[:lead].ljust(lead, b"\0") + p.tobytes() for f, p in zip(frames, _all(scan), strict=True)]
    for i, (a, b) in enumerate(itertools.pairwise((0, *parts, scan.count))):
        first = head.ljust(256, b"T") if i == 0 else b""
        (path.parent / f"{path.name[:-10]}_{i:03d}.tvips").write_bytes(first + b"".join(stored[a:b]))
    return path


def write_mrc(scan: ExactScan, path: Path, *, order: ByteOrder = "<", extended: int = 0) -> Path:
    """An MRC2014 stack."""
    rows, columns = scan.det_shape
    head = bytearray(1024)
    struct.pack_into(order + "4i", head, 0, columns, rows, scan.count, _MRC_MODES[scan.dtype.name])
    struct.pack_into(order + "3i3f", head, 28, columns, rows, scan.count, 20.0 * columns, 10.0 * rows, 1.0)
    struct.pack_into(order + "i", head, 92, extended)
    head[208:216] = b"MAP " + (b"DD\0\0" if order == "<" else b"\x11\x11\0\0")
    path.write_bytes(bytes(head) + b"\x55" * extended + _all(scan, order).tobytes())
    return path


def write_de(
    scan: ExactScan, path: Path, *, positions: Sequence[tuple[int, int]] | None = None, status: str = "Finished"
) -> Path:
    """A Direct Electron ``<stem>_movie.mrc`` with its ``_info.txt``; ``positions`` as (y, x) go to the .csv."""
    stem = path.name.removesuffix("_movie.mrc")
    write_mrc(scan, path)
    rows, columns = scan.scan_shape
    info = {
        "Acquisition Status": status,
        "Autosave Movie Frames Written": scan.count,
        "Autosave Movie Sum Count": 1,
        "Instrument Accelerating Voltage (V)": 300000,
        "Number of Frames Requested": scan.count,
        "Scan - Enable": "Enable",
        "Scan - ROI Enable": "Disable",
        "Scan - Size X": columns,
        "Scan - Size Y": rows,
        "Scan - Type": "Raster" if positions is None else "Random",
        "Specimen Pixel Size X (nanometers)": 0.5,
        "Specimen Pixel Size Y (nanometers)": 0.5,
    }
    text = "".join(f"{name:<60}  = {value}\r\n" for name, value in info.items())
    path.with_name(f"{stem}_info.txt").write_text(text, newline="")
    if positions is not None:
        path.with_name(f"{stem}_scan_coordinates.csv").write_text("".join(f"{x},{y}\n" for y, x in positions))
    return path


def write_ser(scan: ExactScan, path: Path, *, wide: bool = True, valid: int | None = None, gap: int = 24) -> Path:
    """A TIA series, images stored from the bottom row up, ``gap`` bytes of tags behind each."""
    width, (rows, columns) = ("Q" if wide else "I"), scan.det_shape
    dimensions = b"".join(
        struct.pack("<IddII", n, 1.0, 0.5, 0, 4) + b"axis" + struct.pack("<I", 6) + b"meters"
        for n in scan.scan_shape[::-1]
    )
    table = (34 if wide else 30) + len(dimensions)
    first, record = table + 2 * struct.calcsize(width) * scan.count, 50 + scan.dtype.itemsize * rows * columns + gap
    offsets = [first + record * i for i in range(scan.count)]
    tags = [o + record - gap for o in offsets]
    head = struct.pack("<HHHIIII", 0x4949, 0x0197, 0x0220 if wide else 0x0210, 0x4122, 0x4142, scan.count,
                       scan.count if valid is None else valid)  # fmt: skip
    head += struct.pack(f"<{width}I", table, len(scan.scan_shape)) + dimensions
    head += struct.pack(f"<{2 * scan.count}{width}", *offsets, *tags)
    element = struct.pack("<ddiddihii", 0, 1, 0, 0, 1, 0, _SER_TYPES[scan.dtype.name], columns, rows)
    path.write_bytes(head + b"".join(element + f[::-1].tobytes() + b"\xee" * gap for f in _all(scan)))
    return path


def write_seq(scan: ExactScan, path: Path, *, version: int = 5, announced: bool = True, tail: int = 40) -> Path:
    """A StreamPix sequence, ``tail`` bytes of time stamp and padding behind each frame."""
    (rows, columns), bits = scan.det_shape, 8 * scan.dtype.itemsize
    payload = rows * columns * bits // 8
    sizes = (columns, rows, bits, bits, payload, 100, scan.count if announced else 0, 0, payload + tail)
    head = bytearray(8192 if version >= 5 else 1024)
    struct.pack_into("<I24sii", head, 0, 0xFEED, "Norpix seq".encode("utf-16-le"), version, 1024)
    struct.pack_into("<9Id", head, 548, *sizes, 400.0)
    path.write_bytes(bytes(head) + b"".join(f.tobytes() + b"\x99" * tail for f in _all(scan)))
    return path


def write_tiff(
    scan: ExactScan, path: Path, *, order: ByteOrder = "<", big: bool = False, description: str = "", strips: int = 1
) -> Path:
    """A TIFF stack of plain grey pages, each directory behind its pixels, which are in ``strips`` strips."""
    (rows, columns), item, word = scan.det_shape, scan.dtype.itemsize, "Q" if big else "I"
    size, entry = (8, "HHQ") if big else (4, "HHI")
    mark = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    data = bytearray(mark + (struct.pack(order + "HHQ", 8, 0, 0) if big else bytes(4)))
    link = len(data) - size
    for i, frame in enumerate(_all(scan, order)):
        at = len(data)
        data += frame.tobytes()
        per = -(-rows // strips)
        starts = list(range(0, rows, per))
        values: dict[int, tuple[str, list[int] | bytes]] = {
            256: ("I", [columns]), 257: ("I", [rows]), 258: ("H", [8 * item]), 259: ("H", [1]), 262: ("H", [1]),
            270: ("s", description.encode() + b"\0" if description and i == 0 else b"\0"),
            273: (word, [at + y * columns * item for y in starts]), 277: ("H", [1]), 278: ("I", [per]),
            279: ("I", [(min(rows, y + per) - y) * columns * item for y in starts]),
            339: ("H", [{"u": 1, "i": 2, "f": 3}[scan.dtype.kind]]),
        }  # fmt: skip
        entries = b""
        for tag, (code, numbers) in values.items():
            packed = numbers if isinstance(numbers, bytes) else struct.pack(f"{order}{len(numbers)}{code}", *numbers)
            kind = {"s": 2, "H": 3, "I": 4, "Q": 16}[code]
            entries += struct.pack(order + entry, tag, kind, len(numbers))
            if len(packed) <= size:
                entries += packed.ljust(size, b"\0")
            else:
                entries += struct.pack(order + word, len(data))
                data += packed
        struct.pack_into(order + word, data, link, len(data))
        data += struct.pack(order + ("Q" if big else "H"), len(values)) + entries
        link = len(data)
        data += bytes(size)
    path.write_bytes(data)
    return path


def write_dm(
    scan: ExactScan, path: Path, *, version: int = 4, swapped: bool | None = True, order: ByteOrder = "<"
) -> Path:
    """A DigitalMicrograph file with a thumbnail; ``swapped`` False stores the detector's axes first."""
    word = ">Q" if version == 4 else ">I"

    def tag(name: str, kind: int, body: bytes) -> bytes:
        size = struct.pack(">Q", len(body)) if version == 4 else b""
        return struct.pack(">BH", kind, len(name)) + name.encode("latin-1") + size + body

    def value(name: str, info: Sequence[int], stored: bytes) -> bytes:
        described = b"".join(struct.pack(word, n) for n in (len(info), *info))
        return tag(name, 21, b"%%%%" + described + stored)

    def group(name: str, *inside: bytes) -> bytes:
        return tag(name, 20, b"\0\0" + struct.pack(word, len(inside)) + b"".join(inside))

    def text(name: str, words: str) -> bytes:
        return value(name, [20, 4, len(words)], words.encode("utf-16-le" if order == "<" else "utf-16-be"))

    def image(shape: Sequence[int], code: int, kind: int, stored: bytes, *tags: bytes) -> bytes:
        axes = [
            group("", *(value(n, [6], struct.pack(order + "f", v)) for n, v in (("Origin", 2), ("Scale", 4))),
                  text("Units", "nm"))
            for _ in shape
        ]  # fmt: skip
        sizes = [value("", [5], struct.pack(order + "I", n)) for n in shape[::-1]]
        count = int(np.prod(shape))
        return group(
            "",
            group("ImageData", group("Calibrations", group("Dimension", *axes)),
                  value("Data", [20, kind, count], stored), value("DataType", [5], struct.pack(order + "I", code)),
                  group("Dimensions", *sizes)),
            group("ImageTags", group("Meta Data", *tags)),
        )  # fmt: skip

    frames = _all(scan, order).reshape(*scan.scan_shape, *scan.det_shape)
    if swapped is False:
        frames = frames.transpose(2, 3, 0, 1)
    tags = [] if swapped is None else [value("Data Order Swapped", [8], bytes([swapped]))]
    kind = {"i1": 10, "u1": 10, "i2": 2, "u2": 4, "i4": 3, "u4": 5, "f4": 6, "f8": 7}[scan.dtype.str[1:]]
    images = group(
        "ImageList",
        image((2, 2), 23, 5, bytes(16)),
        image(frames.shape, _DM_TYPES[scan.dtype.name], kind, frames.tobytes(), *tags),
    )
    thumbs = group("Thumbnails", group("", value("ImageIndex", [5], struct.pack(order + "I", 0))))
    struct_tag = value("Rectangle", [15, 0, 2, 0, 3, 0, 3], bytes(8))
    body = b"\0\0" + struct.pack(word, 4) + images + thumbs + struct_tag + text("End", "of tags")
    path.write_bytes(
        struct.pack(">I", version) + struct.pack(word, len(body)) + struct.pack(">I", order == "<") + body + bytes(8)
    )
    return path


def write_ndata(scan: ExactScan, path: Path, *, zip64: bool = False, compress: bool = False) -> Path:
    """Swift's .ndata1, by Python's own zipfile."""
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    array = _all(scan).reshape(*scan.scan_shape, *scan.det_shape)
    with zipfile.ZipFile(path, "w", how) as archive:
        with archive.open("data.npy", "w", force_zip64=zip64) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
        archive.writestr("metadata.json", json.dumps(properties(scan)))
    return path


def write_nordif(scan: ExactScan, path: Path) -> Path:
    """NORDIF patterns and their settings, ``<stem>.txt``."""
    (rows, columns), (height, width) = scan.scan_shape, scan.det_shape
    text = (
        f"[NORDIF]\t\t\r\n\t\t\r\n[Microscope]\t\t\r\nAccelerating voltage\t20\tkV\r\n"
        f"[Acquisition settings]\t\t\r\nResolution\t{width}x{height}\tpx\r\n"
        f"[Area]\t\t\r\nStep size\t1.500\tum\r\nNumber of samples\t{columns}x{rows}\t#\r\n"
    )
    path.with_suffix(".txt").write_text(text, newline="")
    path.write_bytes(_all(scan).tobytes())
    return path


def write_ripple(scan: ExactScan, path: Path) -> Path:
    """Lispix's Ripple: a text .rpl and a .raw."""
    rows, columns = scan.det_shape
    said = {
        "width": columns, "height": rows, "depth": scan.count, "offset": 0, "data-length": scan.dtype.itemsize,
        "data-type": {"u": "unsigned", "i": "signed", "f": "float"}[scan.dtype.kind], "byte-order": "little-endian",
        "record-by": "image",
    }  # fmt: skip
    path.write_text("".join(f"{name}\t{value}\n" for name, value in {"key": "value", **said}.items()))
    path.with_suffix(".raw").write_bytes(_all(scan).tobytes())
    return path


def write_velox(scan: ExactScan, path: Path, *, chunk: tuple[int, int, int] | None = None) -> Path:
    """A Velox image stack: ``(y, x, frame)`` in chunks, with the first frame's JSON."""
    import h5py

    said = {
        "Optics": {"AccelerationVoltage": "300000", "CameraLength": "0.5"},
        "BinaryResult": {"PixelSize": {"width": "2", "height": "3"}, "PixelUnitX": "m", "PixelUnitY": "m"},
    }
    text = np.zeros((1000, scan.count), np.uint8)
    words = json.dumps(said).encode()
    text[: len(words)] = np.frombuffer(words, np.uint8)[:, None]
    with h5py.File(path, "w") as file:
        group = file.create_group("Data/Image/0123456789abcdef0123456789abcdef")
        group.create_dataset("Data", data=np.moveaxis(_all(scan), 0, -1), chunks=chunk or (*scan.det_shape, 1))
        group.create_dataset("Metadata", data=text, chunks=(1000, 1))
    return path


def write_zarr(
    scan: ExactScan,
    path: Path,
    chunks: tuple[int, ...],
    *,
    version: int = 2,
    order: ByteOrder = "<",
    codec: str = "zlib",
    compress: Callable[[bytes], bytes] = zlib.compress,
    separator: str = ".",
) -> Path:
    """A Zarr array in whole chunks, whatever ``compress`` and the name ``codec`` of its inverse make of them."""
    array = _all(scan, order).reshape(*scan.scan_shape, *scan.det_shape)
    path.mkdir()
    if version == 2:
        said: dict[str, object] = {"chunks": chunks, "compressor": {"id": codec} if codec else None,
                "dtype": array.dtype.str, "fill_value": 0, "filters": None, "order": "C", "shape": array.shape,
                "zarr_format": 2, "dimension_separator": separator}  # fmt: skip
    else:
        codecs = [{"name": "bytes", "configuration": {"endian": {"<": "little", ">": "big"}.get(order, "little")}}]
        said = {"zarr_format": 3, "node_type": "array", "shape": array.shape, "data_type": scan.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}}, "fill_value": 0,
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": separator}},
                "codecs": codecs + ([{"name": codec}] if codec else [])}  # fmt: skip
    (path / (".zarray" if version == 2 else "zarr.json")).write_text(json.dumps(said))
    for index in np.ndindex(*(-(-n // c) for n, c in zip(array.shape, chunks, strict=True))):
        whole = np.zeros(chunks, array.dtype)
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))]
        whole[tuple(slice(0, n) for n in part.shape)] = part
        name = path / ((f"c{separator}" if version == 3 else "") + separator.join(map(str, index)))
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(compress(whole.tobytes()) if codec else whole.tobytes())
    return path
