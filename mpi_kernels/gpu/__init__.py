"""The terms of a recipe on a graphics card: `mpi_kernels.gpu.fused.accumulator` is the way in."""
