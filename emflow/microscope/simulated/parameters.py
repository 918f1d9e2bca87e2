"""What a simulated microscope is like: the ``[backend.parameters]`` of the microscope server's file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

Pixels = Annotated[int, msgspec.Meta(ge=4, le=1024)]

ABERRATIONS = ("C10_nm", "C12a_nm", "C12b_nm")
STAGE = ("stage_y_nm", "stage_x_nm")
CONTROLS = ABERRATIONS + STAGE

RANGES_NM = {**dict.fromkeys(ABERRATIONS, 1e5), **dict.fromkeys(STAGE, 1e6)}
"""How far each control reaches to either side, nm: 100 um of defocus, 1 mm of stage.  What an operator allows is much
less, and is the business of the server's limits."""


class Hidden(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Aberrations that the controls don't show, nm; what is None is drawn from the seed."""

    C10_nm: float | None = None
    C12a_nm: float | None = None
    C12b_nm: float | None = None

    def given(self) -> dict[str, float]:
        """Those that are not None."""
        return {name: value for name in ABERRATIONS if (value := getattr(self, name)) is not None}


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A simulated microscope.

    Attributes
    ----------
    seed : int
        Chooses specimen, hidden aberrations and noise.
    hidden : Hidden
        Aberrations to find; drawn where not given: ``100 <= |C10| <= 600``, ``0 < |C12| <= 150`` nm.
    semi_angle_mrad : float
        Convergence semi-angle: radius of the bright disc.
    detector_mrad : float
        The detector sees from ``-detector_mrad`` to ``+detector_mrad`` on both axes.
    detector_shape, ronchigram_shape : (int, int)
        Pixels ``(y, x)`` of a frame of a 4D scan and of a camera series.
    dtype : str
        Stored counts; what does not fit saturates.  ``float32`` keeps fractions when ``noise`` is off.
    electrons_per_us : float
        Electrons that reach the specimen in a microsecond; 30 are 4.8 pA, so a frame of 1000 us has 30,000.
    background : float
        Part of the beam that lands outside the disc, evenly.
    noise : bool
        Whether electrons are counted (Poisson), or every pixel has its expectation.
    drift_nm_per_s : (float, float)
        Velocity of the specimen, ``(y, x)``; 0.1 nm/s in all unless told.
    clock : str
        What the drift follows: ``wall`` time, or ``scan``, the sum of all exposures made, which makes data
        reproducible whatever happens between two acquisitions.
    time_scale : float
        Seconds that a second of exposure takes; 0 is as fast as it can.
    format : str
        ``npy`` (with Nion Swift's ``.json``), ``merlin`` or ``hdf5`` (Nion Swift's).  The image of a scan with one
        detector pixel doesn't come from a Merlin camera: it is ``npy`` then.
    writing : str
        ``whole``: under a temporary name, then renamed.  ``rows``: grows under its final name.
    """

    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)] = 0
    hidden: Hidden = Hidden()
    semi_angle_mrad: Annotated[float, msgspec.Meta(gt=0, le=200)] = 25.0
    detector_mrad: Annotated[float, msgspec.Meta(gt=0, le=400)] = 32.0
    detector_shape: tuple[Pixels, Pixels] = (64, 64)
    ronchigram_shape: tuple[Pixels, Pixels] = (256, 256)
    dtype: Literal["uint8", "uint16", "uint32", "float32"] = "uint16"
    electrons_per_us: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 30.0
    background: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.01
    noise: bool = True
    drift_nm_per_s: tuple[float, float] = (0.08, 0.06)
    clock: Literal["wall", "scan"] = "wall"
    time_scale: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0
    format: Literal["npy", "merlin", "hdf5"] = "npy"
    writing: Literal["whole", "rows"] = "whole"


def parse(parameters: Mapping[str, Any]) -> Parameters:
    """Parameters from a table.

    Raises
    ------
    ValueError
        A field is unknown, of another type, or out of its range; the text names it.
    """
    found = msgspec.convert(dict(parameters), Parameters, strict=True)
    numbers = {f"hidden.{name}": value for name, value in found.hidden.given().items()}
    numbers |= {f"drift_nm_per_s[{i}]": value for i, value in enumerate(found.drift_nm_per_s)}
    numbers |= {"time_scale": found.time_scale, "electrons_per_us": found.electrons_per_us}
    for name, value in numbers.items():
        if not math.isfinite(value) or abs(value) > 1e6:
            raise ValueError(f"{name} is {value}, which no microscope has")
    if found.semi_angle_mrad > found.detector_mrad:
        raise ValueError(
            f"semi_angle_mrad {found.semi_angle_mrad:g} is more than the detector sees ({found.detector_mrad:g})"
        )
    if found.format == "merlin" and found.dtype == "float32":
        raise ValueError("dtype is float32, which a Merlin file can't hold: use uint8, uint16 or uint32")
    return found
