"""Groups, datasets, attributes and links of a new HDF5 file, in half the time that h5py's objects take.

A result has hundreds of small ones, and its writing is what a person waits for after the last frame.  These are h5py's
own low-level calls, with types and property lists that are made once; what they write is what `create_group`,
`create_dataset` and `attrs` would: text in UTF-8 of any length, no times.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpi_kernels.errors import printable

SMALL_BYTES = 1024
"""Datasets up to here lie in their own headers (HDF5's compact layout), which saves each a place of its own."""


def group(at: Any, name: str, /, **values: Any) -> Any:
    """A new group with attributes, as h5py.h5g.GroupID."""
    from h5py import h5g

    made = h5g.create(at, name.encode(), _lists().link)
    attributes(made, **values)
    return made


def dataset(at: Any, name: str, value: Any, /, **values: Any) -> Any:
    """A new dataset with attributes, as h5py.h5d.DatasetID.

    Parameters
    ----------
    at : h5py.h5g.GroupID
    name : str
        Without a slash.
    value : array-like
        A text as it is, or what numpy makes an array of.
    **values
        As `attributes` takes them.
    """
    from h5py import h5d, h5s

    data, stored, held, space = _prepared(value)
    how = _lists().small if data.nbytes <= SMALL_BYTES else _lists().large
    made = h5d.create(at, name.encode(), stored, space, dcpl=how, lcpl=_lists().link)
    made.write(h5s.ALL, h5s.ALL, data, mtype=held)  # h5py would make the type once more
    attributes(made, **values)
    return made


def attributes(at: Any, /, **values: Any) -> None:
    """New attributes of a file, a group or a dataset: numbers, texts (`printable`) or lists of texts."""
    from h5py import h5a

    for name, value in values.items():
        data, stored, held, space = _prepared(printable(value) if isinstance(value, str) else value)
        h5a.create(at, name.encode(), stored, space).write(data, mtype=held)


def soft_link(at: Any, name: str, target: str) -> None:
    """A name for a path."""
    at.links.create_soft(name.encode(), target.encode(), _lists().link)


def hard_link(at: Any, name: str, target: Any) -> None:
    """Another name for a group or a dataset that is there."""
    from h5py import h5o

    h5o.link(target, at, name.encode(), lcpl=_lists().link)


def _prepared(value: Any) -> tuple[np.ndarray, Any, Any, Any]:
    """An array, its type in the file and in memory, and its shape there."""
    from h5py import h5s

    data = np.asarray(value, _lists().text if isinstance(value, str | list) else None, order="C")
    stored, held = _lists().text_types if data.dtype.hasobject else _types(data.dtype)
    return data, stored, held, h5s.create_simple(data.shape) if data.ndim else _lists().scalar


@functools.cache
def _types(dtype: np.dtype) -> tuple[Any, Any]:
    """What a dtype is in a file and in memory."""
    from h5py import h5t

    return h5t.py_create(dtype, logical=True), h5t.py_create(dtype)


@functools.cache
def _lists() -> SimpleNamespace:
    """Property lists and what else is made once."""
    from h5py import h5d, h5p, h5s, h5t

    link, large, text = h5p.create(h5p.LINK_CREATE), h5p.create(h5p.DATASET_CREATE), h5t.string_dtype()
    link.set_char_encoding(h5t.CSET_UTF8)
    large.set_obj_track_times(False)
    small = large.copy()
    small.set_layout(h5d.COMPACT)
    types = h5t.py_create(text, logical=True), h5t.py_create(text)
    return SimpleNamespace(
        link=link, large=large, small=small, text=text, text_types=types, scalar=h5s.create(h5s.SCALAR)
    )
