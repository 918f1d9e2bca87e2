"""Figures that can be repeated: ``python -m benchmarks NAME``, JSON with the machine's facts."""
