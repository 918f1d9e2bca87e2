"""A format of long acquisitions in small files: frame i is frame ``i % n`` of the n that an .npy file holds.

Its file is JSON, ``{"frames", "of"}``; the compiled readers get the places of all frames as a table, as of any file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

NPY_HEAD = 128


class Cycling:
    suffixes: ClassVar[tuple[str, ...]] = (".cycling",)

    def probe(self, path: str) -> Header:
        return self.open(path).header

    def open(self, path: str) -> Source:
        facts = json.loads(Path(path).read_text())
        base = np.load(facts["of"], mmap_mode="r")
        payload = base[0].nbytes
        header = Header(
            format="cycling",
            kind="stack",
            scan_shape=(facts["frames"],),
            det_shape=base.shape[1:],
            dtype=base.dtype.newbyteorder("=").name,
            members=(),
            rule="exact",
        )
        offsets = NPY_HEAD + payload * (np.arange(facts["frames"], dtype=np.int64) % len(base))
        return LayoutSource(
            header, Layout(files=(facts["of"],), dtype=base.dtype.str, payload=payload, offsets=offsets)
        )
