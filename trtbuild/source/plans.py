"""plans.json and dataset.json -> ModelSpec. After this nobody looks into either file again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from trtbuild.errors import ModelError
from trtbuild.source.fields import Field, listed
from trtbuild.source.labels import channels_from_dataset, labels_from_dataset
from trtbuild.source.resampling import resampling_from_plans
from trtbuild.spec import CT, ModelSpec, NoNormalization, Normalization, Reader, RescaleTo01, RGBTo01, ZScore

NORMALIZATIONS = (
    "CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization",
)  # fmt: skip
LARGEST_PATCH = 4096  # voxels per axis; a larger number is a mistake in the file, not a patch


def spec_from_plans(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], *, configuration: str, trainer: str
) -> ModelSpec:
    """The spec of one configuration.

    Args:
        plans: the content of plans.json, of any nnU-Net v2.
        dataset: the content of dataset.json.
        configuration: as in the checkpoint, for example "3d_fullres".
        trainer: class name of the trainer, kept as a fact.

    Raises:
        ModelError: a key is missing, or names something that trtbuild cannot reproduce; `where` is its key path.
    """
    plan, data = Field(plans, "plans.json"), Field(dataset, "dataset.json")
    settings = configuration_from_plans(plan, configuration)
    settings["preprocessor_name"].one_of(["DefaultPreprocessor"], "preprocessor")
    if (manager := plan.get("label_manager")) is not None:
        manager.one_of(["LabelManager"], "label manager")
    previous = settings.get("previous_stage")
    return ModelSpec(
        dataset=plan["dataset_name"].text(),
        plans=plan["plans_name"].text(),
        configuration=configuration,
        trainer=trainer,
        channels=channels_from_dataset(data),
        previous_stage=None if previous is None else previous.text(),
        patch=tuple(size.integer(1, LARGEST_PATCH) for size in settings["patch_size"].items()),
        spacing=tuple(size.number() for size in settings["spacing"].items()),
        transpose_forward=_axes(plan["transpose_forward"]),
        transpose_backward=_axes(plan["transpose_backward"]),
        normalization=_normalizations(plan, settings),
        resample_data=resampling_from_plans(settings, "data"),
        resample_segmentation=resampling_from_plans(settings, "seg"),
        resample_probabilities=resampling_from_plans(settings, "probabilities"),
        labels=labels_from_dataset(data),
        reader=_reader(plan["image_reader_writer"]),
        file_ending=_file_ending(data["file_ending"]),
    )


def configuration_from_plans(plans: Field, name: str) -> Field:
    """The settings of a configuration with everything that it inherits; its own settings win."""
    configurations = plans["configurations"]
    chain: list[str] = []
    parent: str | None = name
    while parent is not None:
        if parent in chain:
            raise ModelError("The configurations inherit from each other in a circle.", where=configurations.path,
                             got=" -> ".join([*chain, parent]))  # fmt: skip
        if parent not in configurations.entries():
            raise ModelError(f"There is no configuration {parent!r}.", expected=listed(configurations.entries()),
                             got=parent, where=configurations.path)  # fmt: skip
        chain.append(parent)
        inherits = configurations[parent].get("inherits_from")
        parent = None if inherits is None else inherits.text()
    merged: dict[str, Any] = {}
    for ancestor in reversed(chain):
        merged.update(configurations[ancestor].entries())
    return Field(merged, f"{configurations.path}.{name}")


def _normalizations(plans: Field, settings: Field) -> tuple[Normalization, ...]:
    schemes = settings["normalization_schemes"].items()
    masks = settings["use_mask_for_norm"].items(len(schemes))
    return tuple(_normalization(plans, channel, scheme, mask.flag())
                 for channel, (scheme, mask) in enumerate(zip(schemes, masks, strict=True)))  # fmt: skip


def _normalization(plans: Field, channel: int, scheme: Field, masked: bool) -> Normalization:
    name = scheme.one_of(NORMALIZATIONS, "normalisation")
    if name == "ZScoreNormalization":
        return ZScore(masked=masked)
    if name == "CTNormalization":
        return _ct(plans, channel)
    if name == "RescaleTo01Normalization":
        return RescaleTo01()
    return RGBTo01() if name == "RGBTo01Normalization" else NoNormalization()


def _ct(plans: Field, channel: int) -> CT:
    key = "foreground_intensity_properties_per_channel"
    if key not in plans.entries() and "foreground_intensity_properties_by_modality" in plans.entries():
        key = "foreground_intensity_properties_by_modality"  # plans of the first nnU-Net v2 releases
    intensities = plans[key][str(channel)]
    lower, upper = intensities["percentile_00_5"].number(), intensities["percentile_99_5"].number()
    if lower > upper:
        raise ModelError("The percentiles are swapped.", expected="percentile_00_5 <= percentile_99_5",
                         got=f"{lower} and {upper}", where=intensities.path)  # fmt: skip
    return CT(lower=lower, upper=upper, mean=intensities["mean"].number(), std=intensities["std"].number())


def _axes(axes: Field) -> tuple[int, int, int]:
    first, second, third = (axis.integer(0, 2) for axis in axes.items(3))
    return first, second, third


def _reader(name: Field) -> Reader:
    known: tuple[Reader, ...] = get_args(Reader)
    name.one_of(known, "reader")
    return next(reader for reader in known if reader == name.value)


def _file_ending(ending: Field) -> str:
    if not ending.text().startswith(".") or "/" in ending.text() or "\\" in ending.text():
        raise ending.wrong("a file ending such as .nii.gz")
    return ending.text()
