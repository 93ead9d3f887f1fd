"""dataset.json: labels, regions and channels (nnU-Net's `LabelManager` and `determine_num_input_channels`)."""

from __future__ import annotations

from trtbuild.errors import ModelError
from trtbuild.source.fields import Field
from trtbuild.spec import Labels

HIGHEST_LABEL = 65535  # nnU-Net's writers hold a segmentation in uint16 at most


def labels_from_dataset(dataset: Field) -> Labels:
    """What the network's heads mean, by nnU-Net's rules.

    1. A label that is a list of two or more values makes the model region-based: one head per label that is not
       background, each with the value at its place in `regions_class_order`.
    2. Otherwise there is one head per label value and the segmentation is the index of the largest head. That index
       is the label value only where the values are 0, 1, 2, … without a gap, so anything else is refused.
    3. `ignore` has no head, and must be the highest value plus one.
    """
    labels = dataset["labels"]
    names = {name: _values(Field(value, f"{labels.path}.{name}"))
             for name, value in labels.entries().items() if name != "ignore"}  # fmt: skip
    if names.get("background") != (0,) or isinstance(labels["background"].value, (list, tuple)):
        raise ModelError("The background must be declared as label 0.", expected=0,
                         got=labels.entries().get("background", "no background"), where=labels.path)  # fmt: skip
    values = tuple(sorted({value for covered in names.values() for value in covered}))
    ignore = labels.get("ignore")
    if ignore is not None and ignore.integer(0, HIGHEST_LABEL) != values[-1] + 1:
        raise ModelError("The ignore label must be the highest label plus one.", expected=values[-1] + 1,
                         got=ignore.value, where=ignore.path)  # fmt: skip
    regions = any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.entries().values())
    if not regions and values != tuple(range(len(values))):
        raise ModelError("The labels have a gap: nnU-Net writes the index of the head, which is then not the label.",
                         expected="0, 1, 2, … without a gap", got=values, where=labels.path)  # fmt: skip
    return Labels(
        decision="regions" if regions else "argmax",
        values=_region_values(dataset, names) if regions else values,
        names=names,
        foreground=tuple(value for value in values if value != 0),
        ignore=None if ignore is None else int(ignore.value),
    )


def channels_from_dataset(dataset: Field) -> tuple[str, ...]:
    """Names of the image channels in the order of their files; `modality` is the older name and wins, as in nnU-Net."""
    channels = dataset["modality" if dataset.get("modality") is not None else "channel_names"]
    entries = channels.entries()
    numbers = [str(i) for i in range(len(entries))]
    if not entries or set(entries) != set(numbers):
        raise ModelError("The channels are not numbered 0, 1, 2, …", expected=", ".join(numbers) or "at least one",
                         got=list(entries), where=channels.path)  # fmt: skip
    return tuple(channels[number].text() for number in numbers)


def _values(label: Field) -> tuple[int, ...]:
    """The label values that one name covers."""
    if isinstance(label.value, (list, tuple)) and not label.value:
        raise label.wrong("a label value or an array of them")
    return tuple(_value(item) for item in _flat(label))


def _value(label: Field) -> int:
    """One label value. Digits in a string count, as in nnU-Net, which calls `int` on them."""
    if isinstance(label.value, str) and label.value.isascii() and label.value.isdigit():
        label = Field(int(label.value), label.path)
    return label.integer(0, HIGHEST_LABEL)


def _flat(label: Field) -> tuple[Field, ...]:
    return label.items() if isinstance(label.value, (list, tuple)) else (label,)


def _region_values(dataset: Field, names: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """`regions_class_order`, checked against the regions that are not background."""
    for name in names:  # nnU-Net compares without `int` here, so that "0" would count as a region with a head
        for value in _flat(dataset["labels"][name]):
            value.integer(0, HIGHEST_LABEL)
    regions = [name for name, covered in names.items() if set(covered) != {0}]
    if dataset.get("regions_class_order") is None:
        raise ModelError("A model with regions needs regions_class_order.", expected=f"one value for each of {regions}",
                         where=dataset.path)  # fmt: skip
    order = dataset["regions_class_order"].items(len(regions))
    return tuple(value.integer(0, HIGHEST_LABEL) for value in order)
