"""The commented file that `emflow microscope init` writes; a server without a file uses the same values."""

from __future__ import annotations

_TEMPLATE = """\
# The microscope's server.  Every key is shown with its default; relative paths belong to this file's folder.
# This file belongs to whoever answers for the instrument: nobody can pass its limits, whatever they send.

[server]
address = "127.0.0.1:7763"   # where it listens; only this machine until certificates come
folder = "share"             # where scans are written
state = "microscope-state"   # its memory: answers, lease, STOP; on a local disk
lease_s = 10.0               # who commands must say so at least this often, up to 30
on_lease_lost = "finish"     # the scan that runs when nobody does: finish or abort; the beam is blanked either way

[backend]
use = "simulated"            # name of an entry point in emflow.microscopes, or module:attr

[backend.parameters]         # passed to the backend, which says what it knows

# Limits refuse, they never clip.  Leave a line out and there is no such limit.
[limits]
max_dose_e = 1e14            # electrons of one command
# max_total_dose_e = 1e16    # electrons of all commands since the state folder was made; raise it for a new specimen
max_frames = 262144          # camera frames, or pixels of a scan, of one acquisition
max_queue = 16               # commands that wait
step_nm = { min = 1e-4, max = 1000.0 }
dwell_us = { min = 0.05, max = 1e5 }
exposure_us = { min = 0.1, max = 1e7 }
centre_nm = { min = -1e5, max = 1e5 }

# Only controls that stand here can be set.  min, max: absolute.  max_step: change at once.  per_minute: moves.
# tolerance: how far a value may be off what a command expects.
[limits.controls.C10_nm]
min = -3000.0
max = 3000.0
max_step = 1500.0
per_minute = 240
tolerance = 0.5

[limits.controls.C12a_nm]
min = -1000.0
max = 1000.0
max_step = 500.0
per_minute = 240
tolerance = 0.5

[limits.controls.C12b_nm]
min = -1000.0
max = 1000.0
max_step = 500.0
per_minute = 240
tolerance = 0.5

[limits.controls.stage_y_nm]
min = -1e5
max = 1e5
max_step = 1e4
per_minute = 240
tolerance = 0.5

[limits.controls.stage_x_nm]
min = -1e5
max = 1e5
max_step = 1e4
per_minute = 240
tolerance = 0.5
"""


def template() -> str:
    """Text of a settings file that loads as it is."""
    return _TEMPLATE
