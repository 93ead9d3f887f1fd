"""plans.json: the resampling functions that it names, as values."""

from __future__ import annotations

from typing import Literal

from trtbuild.errors import ModelError
from trtbuild.source.fields import Field, listed
from trtbuild.spec import Resampling

ANISOTROPY_THRESHOLD = 3.0  # nnunetv2/configuration.py: ANISO_THRESHOLD

SPLINE, TORCH, NONE = "resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"
ARGUMENTS = {
    SPLINE: {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"},
    # `num_threads` and `device` say where torch works, not what it computes.
    TORCH: {"is_seg", "num_threads", "device", "memefficient_seg_resampling", "force_separate_z",
            "separate_z_anisotropy_threshold", "mode", "aniso_axis_mode"},
    NONE: set(),
}  # fmt: skip


# Functions beside those, which plans can name and nnU-Net then finds: it calls every one with (data, new shape, current
# spacing, new spacing), which these take for something else.
NOT_CALLABLE = ("resample_torch_simple", "resample_data_or_seg", "resample_data_or_seg_to_spacing")


def resampling_from_plans(configuration: Field, role: Literal["data", "seg", "probabilities"]) -> Resampling:
    """The resampling of image data, segmentations or probabilities, with the function's own defaults filled in."""
    name = configuration[f"resampling_fn_{role}"]
    if name.text() in NOT_CALLABLE:
        raise ModelError(f"nnU-Net itself cannot resample with {name.value}.", expected=listed(ARGUMENTS),
                         got=name.value, where=name.path,
                         hint="it is a helper without spacings among its arguments; was resample_torch_fornnunet "
                         "meant?")  # fmt: skip
    function = configuration[f"resampling_fn_{role}"].one_of(ARGUMENTS, "resampling function")
    arguments = configuration[f"resampling_fn_{role}_kwargs"]
    unknown = sorted(set(arguments.entries()) - ARGUMENTS[function])
    if unknown:
        raise ModelError(f"{function} has no argument {unknown[0]!r}.", got=unknown[0], where=arguments.path,
                         expected=", ".join(sorted(ARGUMENTS[function])) or "no arguments")  # fmt: skip
    if function == SPLINE:
        return _spline(arguments)
    if function == TORCH:
        return _torch(arguments, used=role != "seg" or configuration.get("previous_stage") is not None)
    return Resampling(method="none", is_segmentation=role == "seg", order=0, order_z=0, separate_z="never",
                      anisotropy_threshold=ANISOTROPY_THRESHOLD)  # fmt: skip


def _spline(arguments: Field) -> Resampling:
    # Defaults of nnU-Net's function: order 3, order_z 0, and separate z off where nothing is said about it.
    order, order_z = arguments.get("order"), arguments.get("order_z")
    return Resampling(
        method="spline",
        is_segmentation=_flag(arguments, "is_seg"),
        order=3 if order is None else order.integer(0, 5),
        order_z=0 if order_z is None else order_z.integer(0, 5),
        separate_z=_separate_z(arguments) if "force_separate_z" in arguments.entries() else "never",
        anisotropy_threshold=_threshold(arguments),
    )


def _torch(arguments: Field, *, used: bool) -> Resampling:
    """`used` is False for the segmentations of a model without a previous stage, which nobody resamples."""
    for key, only in (("mode", "linear"), ("aniso_axis_mode", "nearest-exact")):
        if (mode := arguments.get(key)) is not None:
            mode.one_of([only], f"{key} of {TORCH}")
    is_segmentation = _flag(arguments, "is_seg")
    if used and is_segmentation and _flag(arguments, "memefficient_seg_resampling"):
        raise ModelError("memefficient_seg_resampling gives other labels and is not supported.", expected=False,
                         got=True, where=f"{arguments.path}.memefficient_seg_resampling")  # fmt: skip
    return Resampling(method="torch", is_segmentation=is_segmentation, order=1, order_z=0,
                      separate_z=_separate_z(arguments), anisotropy_threshold=_threshold(arguments))  # fmt: skip


def _flag(arguments: Field, key: str) -> bool:
    value = arguments.get(key)
    return value is not None and value.flag()


def _separate_z(arguments: Field) -> Literal["auto", "always", "never"]:
    forced = arguments.get("force_separate_z")
    if forced is None:
        return "auto"
    return "always" if forced.flag() else "never"


def _threshold(arguments: Field) -> float:
    threshold = arguments.get("separate_z_anisotropy_threshold")
    return ANISOTROPY_THRESHOLD if threshold is None else threshold.number()
