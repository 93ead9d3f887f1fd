"""What dataset.json says about labels and regions, as `evaluate` and nnU-Net's summary.json spell them."""

from __future__ import annotations

from collections.abc import Sequence

from trtbuild.accuracy.summary import LabelOrRegion, key_from_label, labels_in
from trtbuild.errors import InputError
from trtbuild.source.fields import Field

HIGHEST_LABEL = 65535  # nnU-Net's writers hold a segmentation in uint16 at most


def labels_from_dataset_json(dataset: Field) -> tuple[tuple[LabelOrRegion, ...], int | None]:
    """What nnU-Net's `LabelManager` evaluates, and the ignore label.

    With regions (a list of two or more labels somewhere) every entry but background and `ignore` counts as it is
    written, so that `3` and `[3]` stay apart; without, the label values but 0 do.
    """
    entries = {name: Field(value, f"{dataset.path}.labels.{name}")
               for name, value in dataset["labels"].entries().items() if name != "ignore"}  # fmt: skip
    written = {name: _written(field) for name, field in entries.items()}
    ignore = dataset["labels"].get("ignore")
    if any(isinstance(value, tuple) and len(value) > 1 for value in written.values()):
        labels = [value for value in written.values() if set(labels_in(value)) != {0}]
    else:
        labels = sorted({member for value in written.values() for member in labels_in(value)} - {0})
    if not labels:
        raise InputError("The dataset has no label to evaluate.", got=list(written), where=f"{dataset.path}.labels")
    return tuple(dict.fromkeys(labels)), None if ignore is None else ignore.integer(0, HIGHEST_LABEL)


def _written(label: Field) -> LabelOrRegion:
    if isinstance(label.value, (list, tuple)):
        if not label.value:
            raise label.wrong("a label value or an array of them")
        return tuple(_integer(item) for item in label.items())
    return _integer(label)


def _integer(label: Field) -> int:
    """Digits in a string count, as in nnU-Net, which calls `int` on them."""
    if isinstance(label.value, str) and label.value.isascii() and label.value.isdigit():
        return Field(int(label.value), label.path).integer(0, HIGHEST_LABEL)
    return label.integer(0, HIGHEST_LABEL)


def names_in_summary(dataset: Field, labels: Sequence[LabelOrRegion]) -> dict[str, str]:
    """The label names of dataset.json under the keys of summary.json; several names of one label together."""
    written = {name: _written(Field(value, name)) for name, value in dataset["labels"].entries().items()}
    return {
        key_from_label(label): ", ".join(name for name, value in written.items() if value in (label, (label,)))
        for label in labels
    }
