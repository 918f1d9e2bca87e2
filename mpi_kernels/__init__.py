"""4D-STEM reductions for compute nodes: numpy and h5py on one rank, mpi4py on many; never imports emflow."""

__version__ = "0.1.0"
