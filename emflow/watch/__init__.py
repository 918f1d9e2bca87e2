"""Noticing acquisitions: scans are truth, hints only make them happen sooner."""
