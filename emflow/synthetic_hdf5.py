"""Exact scans as HDF5 files: Nion Swift, py4DSTEM, HyperSpy, NeXus, Dectris, stempy; h5py is imported when used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emflow.synthetic_pace import AT_ONCE, ByteOrder, Pace, blocks, properties
from mpi_kernels.exact import ExactScan

if TYPE_CHECKING:
    import h5py


def _fill(file: h5py.File, dataset: h5py.Dataset, scan: ExactScan, pace: Pace) -> None:
    """Write rows into an array that has its full size already; ``blocks`` gives whole rows, or one row's part."""
    for start, stop in blocks(scan, pace):
        if len(scan.scan_shape) == 2:
            width = scan.scan_shape[1]
            for i in range(start, stop):
                dataset[i // width, i % width] = scan.frame(i)
        elif scan.scan_shape:
            dataset[start:stop] = scan.frames(start, stop)
        else:
            dataset[...] = scan.frame(0)
        file.flush()


def _dataset(
    group: h5py.Group,
    scan: ExactScan,
    byte_order: ByteOrder = "=",
    chunk: tuple[int, ...] | None = None,
    compression: str | None = None,
) -> h5py.Dataset:
    return group.create_dataset(
        "data",
        (*scan.scan_shape, *scan.det_shape),
        scan.dtype.newbyteorder(byte_order),
        chunks=chunk,
        compression=compression,
    )


def _names(scan: ExactScan) -> tuple[str, ...]:
    return (*("y", "x")[2 - len(scan.scan_shape) :], "ky", "kx")


def write_nion_h5(
    scan: ExactScan,
    path: Path,
    *,
    pace: Pace = AT_ONCE,
    byte_order: ByteOrder = "=",
    chunk: tuple[int, ...] | None = None,
) -> Path:
    """Nion Swift's .h5: ``/data`` with JSON ``properties``, contiguous unless ``chunk`` is given."""
    import h5py

    with h5py.File(path, "w") as file:
        data = _dataset(file, scan, byte_order, chunk)
        data.attrs["properties"] = json.dumps(properties(scan))
        _fill(file, data, scan, pace)
    return path


def write_emd(
    scan: ExactScan,
    path: Path,
    *,
    pace: Pace = AT_ONCE,
    byte_order: ByteOrder = "=",
    chunk: tuple[int, ...] | None = None,
) -> Path:
    """EMD 1.0 as py4DSTEM writes it: ``datacube_root/datacube`` with ``data`` and ``dim0``..."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs.update({"emd_group_type": "file", "version_major": 1, "version_minor": 0})
        root = file.create_group("datacube_root")
        root.attrs["emd_group_type"] = "root"
        group = root.create_group("datacube")
        group.attrs.update({"emd_group_type": "array", "python_class": "DataCube"})
        data = _dataset(group, scan, byte_order, chunk)
        data.attrs["units"] = "counts"
        for i, axis in enumerate(properties(scan)["dimensional_calibrations"]):
            dim = group.create_dataset(f"dim{i}", data=[axis["offset"], axis["offset"] + axis["scale"]])
            dim.attrs.update({"units": axis["units"], "name": _names(scan)[i]})
        _fill(file, data, scan, pace)
    return path


def write_hspy(scan: ExactScan, path: Path, *, pace: Pace = AT_ONCE, compression: str | None = "gzip") -> Path:
    """HyperSpy's .hspy: chunks of one frame, compressed."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs.update({"file_format": "HyperSpy", "file_format_version": "3.3"})
        group = file.create_group("Experiments/__unnamed__")
        group.attrs.update({"package": "hyperspy", "package_version": "2.5.0"})
        for name in ("attributes", "learning_results", "metadata", "metadata/Signal", "original_metadata"):
            group.create_group(name)
        group["attributes"].attrs.update({"_lazy": False, "ragged": False})
        group["metadata/Signal"].attrs["signal_type"] = ""
        chunk = (*(1 for _ in scan.scan_shape), *scan.det_shape)
        data = _dataset(group, scan, "=", chunk, compression)
        names = _names(scan)
        for i, (axis, name) in enumerate(zip(properties(scan)["dimensional_calibrations"], names, strict=True)):
            group.create_group(f"axis-{i}").attrs.update(
                {
                    **axis,
                    "_type": "UniformDataAxis",
                    "is_binned": False,
                    "name": name,
                    "navigate": i < len(scan.scan_shape),
                    "size": data.shape[i],
                }
            )
        _fill(file, data, scan, pace)
    return path


def write_nxdata(
    scan: ExactScan,
    path: Path,
    *,
    pace: Pace = AT_ONCE,
    byte_order: ByteOrder = "=",
    chunk: tuple[int, ...] | None = None,
    compression: str | None = None,
) -> Path:
    """A NeXus file whose default NXdata holds the frames."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs.update({"NX_class": "NXroot", "default": "entry"})
        entry = file.create_group("entry")
        entry.attrs.update({"NX_class": "NXentry", "default": "data"})
        group = entry.create_group("data")
        data = _dataset(group, scan, byte_order, chunk, compression)
        names = _names(scan)
        group.attrs.update({"NX_class": "NXdata", "signal": "data", "axes": list(names)})
        for i, (axis, name) in enumerate(zip(properties(scan)["dimensional_calibrations"], names, strict=True)):
            values = axis["offset"] + axis["scale"] * np.arange(data.shape[i])
            group.create_dataset(name, data=values).attrs["units"] = axis["units"]
        _fill(file, data, scan, pace)
    return path


def write_dectris(
    scan: ExactScan, path: Path, *, per_file: int = 7, codec: str = "bitshuffle", sidecar: bool = True
) -> Path:
    """A Dectris master ``<stem>_master.h5`` with data files, and the sidecar with the scan's shape."""
    import h5py
    import hdf5plugin

    stem = path.name.removesuffix("_master.h5")
    choices: dict[str, Any] = {"bitshuffle": hdf5plugin.Bitshuffle(), "lz4": hdf5plugin.LZ4(), "plain": {}}
    options = choices[codec]
    with h5py.File(path, "w") as master:
        specific = master.create_group("entry/instrument/detector/detectorSpecific")
        specific["nimages"], specific["ntrigger"] = np.uint64(1), np.uint64(scan.count)
        specific["pixel_mask"] = np.zeros(scan.det_shape, np.uint32)
        group = master.create_group("entry/data")
        for number, start in enumerate(range(0, scan.count, per_file), 1):
            stop = min(start + per_file, scan.count)
            name = f"{stem}_data_{number:06d}.h5"
            group[f"data_{number:06d}"] = h5py.ExternalLink(name, "/entry/data/data")
            with h5py.File(path.with_name(name), "w") as file:
                data = file.create_dataset(
                    "entry/data/data", data=scan.frames(start, stop), chunks=(1, *scan.det_shape), **options
                )
                data.attrs.update({"image_nr_low": start + 1, "image_nr_high": stop})
    if sidecar and len(scan.scan_shape) == 2:
        with h5py.File(path.with_name(f"{stem}.h5"), "w") as file:
            facts = file.create_group("STEM Metadata")
            facts.attrs.update({"NumPixelsY": [scan.scan_shape[0]], "NumPixelsX": [scan.scan_shape[1]]})
    return path


def write_stempy(scan: ExactScan, path: Path) -> Path:
    """Counted data as stempy writes them: a pixel is named as often as it counted."""
    import h5py

    with h5py.File(path, "w") as file:
        group = file.create_group("electron_events")
        frames = group.create_dataset("frames", (scan.count,), h5py.vlen_dtype(np.uint32))
        frames.attrs.update({"Ny": scan.det_shape[0], "Nx": scan.det_shape[1]})
        positions = group.create_dataset("scan_positions", data=np.arange(scan.count))
        positions.attrs.update({"Ny": scan.scan_shape[0], "Nx": scan.scan_shape[1]})
        for i in range(scan.count):
            counts = scan.frame(i).reshape(-1)
            frames[i] = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    return path


def write_topspin(scan: ExactScan, path: Path) -> Path:
    """TopSpin's .app5: a dataset for each frame, with the beam position in its XML."""
    import h5py

    width = scan.scan_shape[-1]
    with h5py.File(path, "w") as file:
        series = file.create_group("18d9446f-22bf-4fb1-8d13-338174e75d20/3526f008-a687-41fb-a21e-c21362241492")
        for i in range(scan.count):
            y, x = (2e-9 * n for n in divmod(i, width))
            series[f"{i}/Data"] = scan.frame(i)
            place = f'<Value><X Version="1">{x:.15g}</X><Y Version="1">{y:.15g}</Y></Value>'
            series[f"{i}/Metadata"] = np.bytes_(f"<Metadata><Name>RequestedBeamPosition</Name>{place}</Metadata>")
    return path
