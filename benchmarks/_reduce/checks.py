"""Digests of results, which go through pipes instead of arrays, and their comparison.

Used in other programs' environments too: numpy and the standard library only.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Check = dict[str, Any]
"""``weighted``: sum of values times 1 + index % 997, which a moved value changes; ``sha256``: of integers."""


def digest(array: Any) -> Check:
    """Digest of an array."""
    values = np.ascontiguousarray(array)
    flat = values.reshape(-1)
    found: Check = {
        "size": int(flat.size),
        "weighted": float((flat.astype(np.float64) * (1.0 + np.arange(flat.size) % 997)).sum()),  # no BLAS: it spins
    }
    if values.dtype.kind in "iu":
        found["sha256"] = hashlib.sha256(flat.astype(np.int64).data).hexdigest()
    return found


def differs(found: Check, wanted: Check, *, relative: float) -> str | None:
    """What is wrong with a digest; integers must be equal to the bit where ``relative`` is 0."""
    if found["size"] != wanted["size"]:
        return f"{found['size']} values instead of {wanted['size']}"
    if not relative and "sha256" in wanted:
        return None if found.get("sha256") == wanted["sha256"] else "integers differ"
    bound = (relative or 1e-6) * abs(wanted["weighted"])
    if not abs(found["weighted"] - wanted["weighted"]) <= bound:
        return f"sums to {found['weighted']!r} instead of {wanted['weighted']!r}"
    return None
