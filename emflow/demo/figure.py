"""The figure of the demonstration: what the loop did to the image, to the residual, and where its time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from emflow.errors import Unavailable
from emflow.timeline import waterfall
from mpi_kernels.contract import Event

if TYPE_CHECKING:
    import numpy as np

IMAGE = "bright_field/image"
"""Map of the result that shows the specimen."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy measured after one acquisition; ``merit`` is None where its gate refused to say."""

    acquisition: int
    merit: float | None
    trusted: bool = True


def require_matplotlib() -> None:
    """Raise `Unavailable` where matplotlib is not installed or broken; to be known before anything is started."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Unavailable("the figure needs matplotlib", next_step="Get it: pip install 'emflow[notebook]'") from error


def read_image(result: Path) -> np.ndarray:
    """The virtual image of a result file: (scan_y, scan_x) float64, counts."""
    import h5py
    import numpy as np

    with h5py.File(result, "r") as file:
        group = file[IMAGE]
        image: np.ndarray = np.asarray(group[str(group.attrs["signal"])], dtype="float64")
    return image


def draw(
    path: Path,
    images: Mapping[str, np.ndarray],
    estimates: Sequence[Estimate],
    truth: Sequence[Mapping[str, float]],
    events: Sequence[Event],
) -> None:
    """Draw images, residuals and one waterfall into a PNG.

    Parameters
    ----------
    path : Path
        The PNG.
    images : mapping of str to (scan_y, scan_x) ndarray
        Title and virtual image, the first and the last one.
    estimates : sequence of Estimate
        What the policy measured, in nm, acquisition by acquisition.
    truth : sequence of mapping
        True size of each coefficient in nm, ``{"C10": .., "C12": ..}``, before the first command and after the last.
    events : sequence of Event
        Of one acquisition.

    Raises
    ------
    Unavailable
        matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.1))
    for column, (title, image) in enumerate(images.items()):
        axes = figure.add_subplot(grid[0, column])
        figure.colorbar(axes.imshow(image, cmap="gray"), ax=axes, shrink=0.75, label="counts")
        axes.set(title=title, xticks=[], yticks=[])
    _residuals(figure.add_subplot(grid[0, 2]), estimates, truth)
    _waterfall(figure.add_subplot(grid[1, :]), events)
    figure.savefig(path, dpi=110)


def _residuals(axes: Any, estimates: Sequence[Estimate], truth: Sequence[Mapping[str, float]]) -> None:
    """Measured size of what is left, step by step; what the simulator says itself, at both ends."""
    told = [e for e in estimates if e.merit is not None]
    axes.plot([e.acquisition for e in told], [e.merit for e in told], "o-", color="tab:blue", label="as measured")
    for e in (e for e in told if not e.trusted):
        axes.plot(e.acquisition, e.merit, "x", color="tab:red", markersize=12, label="refused by the gate")
    # the last correction follows the last acquisition
    ends = (1, max((e.acquisition for e in estimates), default=1) + 0.5)
    for name, marker, colour in (("C10", "^", "tab:orange"), ("C12", "v", "tab:green")):
        sizes = [state[name] for state in truth if name in state]
        axes.plot(ends[: len(sizes)], sizes, marker, color=colour, markersize=9, label=f"true |{name}|")
    axes.set(yscale="log", xlabel="acquisition", ylabel="nm", title="what is left of the aberrations")
    axes.set_xticks(range(1, int(ends[1]) + 1))
    axes.axhline(5.0, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(fontsize=8)
    axes.grid(visible=True, which="major", alpha=0.3)


def _waterfall(axes: Any, events: Sequence[Event]) -> None:
    bars = waterfall(events)
    for row, bar in enumerate(bars):
        colour = "tab:orange" if bar.inside_job else "tab:blue"
        axes.barh(row, bar.stop_s - bar.start_s, left=bar.start_s, color=colour)
        axes.text(bar.stop_s, row, f" {1e3 * (bar.stop_s - bar.start_s):.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds after the command was sent")
    axes.margins(x=0.08)
    axes.set_title("one acquisition, from its command to the next one (orange: inside the job)")
