"""The control plane: typed commands for a microscope, executed at most once, within limits that lie beside it."""
