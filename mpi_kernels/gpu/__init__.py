"""The terms of a recipe on a graphics card: `mpi_kernels.gpu.fused.attempt` is the way in."""
