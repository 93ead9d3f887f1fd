"""nnU-Net's summary.json as values: metrics of every case, their means, the mean over the foreground."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtbuild.accuracy.metrics import Overlap
from trtbuild.accuracy.surface import SurfaceAgreement

LabelOrRegion = int | tuple[int, ...]
"""nnU-Net's distinction: `3` is written "3", the region `[3]` of dataset.json "(3,)"."""


@dataclass(frozen=True, kw_only=True)
class CaseMetrics:
    """What was measured in one case; `surfaces` is None where that was not asked for."""

    reference_file: str
    prediction_file: str
    overlaps: Mapping[LabelOrRegion, Overlap]
    surfaces: Mapping[LabelOrRegion, SurfaceAgreement] | None


def key_from_label(label: LabelOrRegion) -> str:
    """The key in summary.json: nnU-Net's `label_or_region_to_key`."""
    return str(label)


def labels_in(label: LabelOrRegion) -> tuple[int, ...]:
    """The label values that a label or region covers."""
    return label if isinstance(label, tuple) else (label,)


def nnunet_metrics(overlap: Overlap) -> dict[str, float]:
    """One label's metrics under nnU-Net's names."""
    return {"Dice": overlap.dice, "IoU": overlap.iou, "FP": overlap.fp, "TP": overlap.tp, "FN": overlap.fn,
            "TN": overlap.tn, "n_pred": overlap.n_pred, "n_ref": overlap.n_ref}  # fmt: skip


def per_case(cases: Iterable[CaseMetrics]) -> list[dict[str, Any]]:
    """`metric_per_case` of summary.json."""
    return [
        {"reference_file": case.reference_file, "prediction_file": case.prediction_file,
         "metrics": {key_from_label(label): nnunet_metrics(o) for label, o in case.overlaps.items()}}
        for case in cases
    ]  # fmt: skip


def summary_from_cases(cases: Sequence[CaseMetrics]) -> dict[str, Any]:
    """nnU-Net's three keys, as its `compute_metrics_on_folder` returns them.

    A mean is over the cases in which the metric is not NaN, and NaN where it is in all; `foreground_mean` is the mean
    of these over all labels but 0, and NaN as soon as one of them is.
    """
    values = [{label: nnunet_metrics(overlap) for label, overlap in case.overlaps.items()} for case in cases]
    means = {
        label: {name: mean_of_numbers(case[label][name] for case in values) for name in metrics}
        for label, metrics in values[0].items()
    }
    foreground = [metrics for label, metrics in means.items() if label != 0]
    names = next(iter(means.values()))
    return {
        "metric_per_case": per_case(cases),
        "mean": {key_from_label(label): metrics for label, metrics in means.items()},
        "foreground_mean": {
            name: float(np.mean([metrics[name] for metrics in foreground])) if foreground else float("nan")
            for name in names
        },
    }


def surface_summary(cases: Sequence[CaseMetrics]) -> dict[str, Any]:
    """HD95 and NSD in the form of summary.json.

    The mean HD95 is over the cases in which reference and prediction both hold the label; `one_empty` counts those in
    which only one does, whose HD95 is infinite (written as Infinity) and whose NSD is 0.
    """
    found = [(case, case.surfaces) for case in cases if case.surfaces is not None]
    labels = tuple(found[0][1]) if found else ()
    means = {label: _surface_means([surfaces[label] for _, surfaces in found]) for label in labels}
    foreground = [metrics for label, metrics in means.items() if label != 0]
    return {
        "metric_per_case": [
            {"prediction_file": case.prediction_file,
             "metrics": {key_from_label(label): {"HD95": s.hd95, "NSD": s.nsd} for label, s in surfaces.items()}}
            for case, surfaces in found
        ],
        "mean": {key_from_label(label): metrics for label, metrics in means.items()},
        "foreground_mean": {name: mean_of_numbers(metrics[name] for metrics in foreground) for name in ("HD95", "NSD")},
    }  # fmt: skip


def _surface_means(surfaces: Sequence[SurfaceAgreement]) -> dict[str, float]:
    return {
        "HD95": mean_of_numbers(s.hd95 for s in surfaces if not s.one_empty),
        "NSD": mean_of_numbers(s.nsd for s in surfaces),
        "one_empty": sum(s.one_empty for s in surfaces),
    }


def mean_of_numbers(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN, summed as nnU-Net does (np.nanmean); NaN where there is none."""
    array = np.array(list(values))
    return float(np.nanmean(array)) if array.size and not np.isnan(array).all() else float("nan")
