"""Joins an electron microscope to a supercomputer: notice, move, reduce, steer."""

from mpi_kernels import __version__

__all__ = ["__version__"]
