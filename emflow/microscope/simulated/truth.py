"""The answer, for those who compare at the end: never asked by what steers the microscope."""

from __future__ import annotations

from pathlib import Path

from emflow.microscope.simulated.column import load
from emflow.microscope.simulated.parameters import ABERRATIONS


def truth(state: Path) -> dict[str, float]:
    """True aberrations of a simulated column, now.

    Parameters
    ----------
    state : Path
        The microscope's private folder.

    Returns
    -------
    dict of float
        ``C10_nm``, ``C12a_nm``, ``C12b_nm``: control + hidden; and ``hidden_C10_nm``, ``hidden_C12a_nm``,
        ``hidden_C12b_nm``: what they are with all controls at 0.

    Raises
    ------
    ValueError
        There is no readable column.
    """
    try:
        column = load(state)
    except FileNotFoundError as error:
        raise ValueError(f"no simulated column in {state}") from error
    true = {name: column.controls[name] + column.hidden[name] for name in ABERRATIONS}
    return true | {f"hidden_{name}": column.hidden[name] for name in ABERRATIONS}
