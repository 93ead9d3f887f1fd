"""Agreement of two surfaces in millimetres: HD95 and the normalised surface dice (NSD).

By surface-distance, the library of the authors of the NSD (Nikolov et al. 2021): each piece of a surface counts by its
area in mm2 for the given spacing, so anisotropic voxels are no special case. The one file that knows it. Its tables of
areas and its two metrics are used; its search for the nearest surface is not: that takes ten times as long, fails over
empty masks under NumPy 2, and uses names that SciPy 2 removes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.accuracy.metrics import Labels
from trtbuild.errors import InputError, MissingExtra

PERCENT = 95


@dataclass(frozen=True, kw_only=True)
class SurfaceAgreement:
    """Of one label or region.

    `hd95` is in mm: the larger of the two directed distances below which 95 % of a surface's area lies. `nsd` is the
    share of both surfaces' area that lies within the tolerance of the other one. Where neither segmentation holds the
    label both are NaN; where only one does, the surfaces are infinitely far apart: infinity and 0.
    """

    hd95: float
    nsd: float

    @property
    def one_empty(self) -> bool:
        """Exactly one of the two segmentations holds the label."""
        return math.isinf(self.hd95)


def require_surface_library() -> None:
    """Raises MissingExtra where the library is not installed."""
    _library()


def surface_agreement(
    reference: Labels, prediction: Labels, region: Collection[int], spacing: Sequence[float], tolerance: float,
    ignore: int | None = None,
) -> SurfaceAgreement:  # fmt: skip
    """HD95 and NSD of a region (a label is a region of one).

    Args:
        reference: labels (Z, Y, X); where Z is 1, contours in the plane are compared instead of surfaces.
        prediction: labels, of the same shape.
        region: its labels.
        spacing: (z, y, x) in mm.
        tolerance: in mm.
        ignore: voxels where the reference holds this label are background in both.

    Raises:
        InputError: the shapes differ.
        MissingExtra: the library is not installed.
    """
    library = _library()
    if reference.shape != prediction.shape:
        raise InputError("Two segmentations differ in shape.", expected=reference.shape, got=prediction.shape)
    ours, theirs = _mask(reference, region), _mask(prediction, region)
    if ignore is not None:
        theirs &= reference != ignore
    ours, theirs = _cropped(ours, theirs)
    if not ours.any() or not theirs.any():
        neither = not ours.any() and not theirs.any()
        return SurfaceAgreement(hd95=math.nan if neither else math.inf, nsd=math.nan if neither else 0.0)
    if reference.shape[0] == 1:
        ours, theirs, spacing = ours[0], theirs[0], spacing[1:]
    distances = _surface_distances(ours, theirs, np.array(spacing, np.float64))
    return SurfaceAgreement(
        hd95=float(library.compute_robust_hausdorff(distances, PERCENT)),
        nsd=float(library.compute_surface_dice_at_tolerance(distances, tolerance)),
    )


def _surface_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """What the library's `compute_surface_distances` returns for masks that are not empty.

    A piece of surface lies in each cell of 2x2(x2) voxels that the mask cuts; its place is the middle of the cell.
    """
    from surface_distance import lookup_tables as tables

    if reference.ndim == 3:
        kernel = tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
        sizes = tables.create_table_neighbour_code_to_surface_area(tuple(spacing))
    else:
        kernel = tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL
        sizes = tables.create_table_neighbour_code_to_contour_length(tuple(spacing))
    codes = [_cell_codes(mask, np.asarray(kernel)) for mask in (reference, prediction)]
    borders = [(code != 0) & (code != 2**kernel.size - 1) for code in codes]
    found = {}
    for name, direction, a, b in (("gt", "gt_to_pred", 0, 1), ("pred", "pred_to_gt", 1, 0)):
        distances, areas = _nearest(borders[a], borders[b], spacing), sizes[codes[a][borders[a]]]
        order = np.lexsort((areas, distances))
        found[f"distances_{direction}"], found[f"surfel_areas_{name}"] = distances[order], areas[order]
    return found


def _cell_codes(mask: NDArray[np.bool_], kernel: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """For every cell, also those half outside, the sum of the kernel's weights where its corners are in the mask."""
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([size + 1 for size in mask.shape], np.uint8)
    for corner in np.ndindex(*kernel.shape):
        here = padded[tuple(slice(start, start + size) for start, size in zip(corner, codes.shape, strict=True))]
        codes += here * np.uint8(kernel[corner])
    return codes


def _nearest(places: NDArray[np.bool_], others: NDArray[np.bool_], spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance in mm from each of `places` to the nearest of `others`, in the order of `places[places]`."""
    from scipy.spatial import KDTree

    distances = np.zeros(np.count_nonzero(places), np.float64)
    apart = places & ~others  # the rest, most of two surfaces that agree, is 0 mm away
    if apart.any():
        there, here = np.argwhere(others), np.argwhere(apart)
        tree = KDTree(there * spacing, balanced_tree=False, compact_nodes=False)  # quicker to build
        steps = there[tree.query(here * spacing)[1]] - here
        # from whole steps, so that two steps of 0.6 mm are 1.2 mm and not a rounding error beyond that tolerance
        distances[apart[places]] = np.sqrt(((steps * spacing) ** 2).sum(axis=1))
    return distances


def _library() -> Any:
    try:
        import surface_distance
    except ImportError as error:
        raise MissingExtra("surface-distance", "evaluate", "compute HD95 and NSD") from error
    return surface_distance


def _mask(segmentation: Labels, region: Collection[int]) -> NDArray[np.bool_]:
    mask = np.zeros(segmentation.shape, bool)
    for label in region:
        mask |= segmentation == label
    return mask


def _cropped(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Copies of both in the smallest box that holds both: what is left when the whole masks are freed."""
    both = a | b
    box = []
    for axis in range(both.ndim):
        hit = np.flatnonzero(both.any(axis=tuple(other for other in range(both.ndim) if other != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
    return a[tuple(box)].copy(), b[tuple(box)].copy()
