"""What the benchmark of the kernels is made of: sets of frames, contestants, rounds, and the figures of each kind."""
