"""The figure of the demonstration: what one acquisition became, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emflow.errors import Unavailable
from emflow.records import Acquisition
from emflow.timeline import waterfall
from mpi_kernels.contract import Event


def require_matplotlib() -> None:
    """Raise `Unavailable` where matplotlib is not installed or broken; to be known before anything is started."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Unavailable("the figure needs matplotlib", next_step="Get it: pip install 'emflow[notebook]'") from error


def draw(path: Path, result: Path, acquisition: Acquisition, events: Sequence[Event]) -> None:
    """Draw virtual images, sum pattern, centre of mass and the waterfall of one acquisition into a PNG.

    Raises
    ------
    Unavailable
        matplotlib is not installed.
    """
    require_matplotlib()
    import h5py
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.05))
    with h5py.File(result, "r") as file:
        maps = [
            ("bright_field/image", "virtual bright field", "gray"),
            ("dark_field/image", "virtual dark field", "gray"),
            ("pattern/sum", "sum pattern (log)", "magma"),
        ]
        for column, (name, title, colours) in enumerate(maps):
            _map(figure, grid[0, column], file[name], title, colours)
        _vectors(figure, grid[0, 3], file["centre_of_mass"])
    _waterfall(figure.add_subplot(grid[1, :]), events)
    figure.suptitle(f"{acquisition.name}  ({acquisition.format}, {acquisition.kind}, {acquisition.frames} frames)")
    figure.savefig(path, dpi=110)


def _map(figure: Any, place: Any, group: Any, title: str, colours: str) -> None:
    import numpy as np

    data = np.asarray(group[str(group.attrs["signal"])], dtype="float64")
    shown = np.log1p(data) if "log" in title else data
    axes = figure.add_subplot(place)
    image = axes.imshow(shown, cmap=colours)
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.7)


def _vectors(figure: Any, place: Any, group: Any) -> None:
    """Deviation of the centre of mass from its mean as colour: hue is direction, brightness is size."""
    import numpy as np
    from matplotlib.colors import hsv_to_rgb

    y, x = (np.asarray(group[f"{name}/data"]) for name in ("y", "x"))
    dy, dx = y - np.nanmean(y), x - np.nanmean(x)
    size = np.hypot(dy, dx)
    top = float(np.nanmax(size)) or 1.0
    hsv = np.stack([(np.arctan2(dy, dx) / (2 * np.pi)) % 1.0, np.ones_like(size), size / top], axis=-1)
    axes = figure.add_subplot(place)
    axes.imshow(hsv_to_rgb(np.nan_to_num(hsv)))
    axes.set_title(f"centre of mass, up to {top:.2f} px")
    axes.set_xticks([])
    axes.set_yticks([])


def _waterfall(axes: Any, events: Sequence[Event]) -> None:
    bars = waterfall(events)
    for row, bar in enumerate(bars):
        colour = "tab:orange" if bar.inside_job else "tab:blue"
        axes.barh(row, bar.stop_s - bar.start_s, left=bar.start_s, color=colour)
        axes.text(bar.stop_s, row, f" {1e3 * (bar.stop_s - bar.start_s):.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds after the acquisition was noticed")
    axes.margins(x=0.08)
    axes.set_title("where the time went (orange: inside the job)")
