"""The values that travel between the rooms: what a model is, what a network is, how an engine was built.

Everything here is frozen and holds resolved numbers, never nnU-Net's names for them, so that a reader in C++ or CUDA
needs no plans.json. Arrays are (C, Z, Y, X) or (C, Y, X); spacings are millimetres in array axis order. The classes
are plain dataclasses; `value_from_json` checks foreign data against them with pydantic, which is imported late.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, cast

from trtbuild.errors import ModelError

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Reader = Literal[
    "SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient", "NaturalImage2DIO", "Tiff3DIO"
]
Json = Mapping[str, Any]

STRICT: dict[str, Any] = {"extra": "forbid"}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, NumPy dtype and shape of a network input or output; a name instead of a number is a free dimension."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class ZScore:
    """(x - mean) / max(std, 1e-8) over the channel; over the nonzero mask only where `masked` (the rest stays 0)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["zscore"] = "zscore"
    masked: bool


@dataclass(frozen=True, kw_only=True)
class CT:
    """Clip to [lower, upper], subtract mean, divide by max(std, 1e-8): numbers of the training foreground."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["ct"] = "ct"
    lower: float
    upper: float
    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class NoNormalization:
    """The intensities as they are."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class RescaleTo01:
    """(x - min) / max(max - min, 1e-8) of the channel."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["rescale_to_01"] = "rescale_to_01"


@dataclass(frozen=True, kw_only=True)
class RGBTo01:
    """x / 255; values outside 0..255 are an error."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["rgb_to_01"] = "rgb_to_01"


Normalization = ZScore | CT | NoNormalization | RescaleTo01 | RGBTo01


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How an array goes from one grid to another.

    `method` "spline" is nnU-Net's `resample_data_or_seg_to_shape` (skimage's resize, clipped to the input's range),
    "torch" its `resample_torch_fornnunet`, "none" its `no_resampling_hack`. With `separate_z` "auto" slices are
    resized in-plane with `order` and the coarse axis follows with `order_z` where the spacing's largest / smallest
    exceeds `anisotropy_threshold` and exactly one axis is the coarse one.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    method: Literal["spline", "torch", "none"]
    is_segmentation: bool
    order: int
    order_z: int
    separate_z: Literal["auto", "always", "never"]
    anisotropy_threshold: float


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the network's output channels mean.

    `decision` "argmax": the segmentation is `values[argmax over heads]`, ties take the first. "regions": every head is
    a yes/no (sigmoid > 0.5) and writes its value, later heads over earlier ones. `names` maps nnU-Net's label names
    to the label values they cover. The file's type is uint8 where the case's maximum is below 255, else uint16.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    decision: Literal["argmax", "regions"]
    values: tuple[int, ...]
    names: Mapping[str, tuple[int, ...]]
    foreground: tuple[int, ...]
    ignore: int | None
    dtype_rule: Literal["uint8_below_255_else_uint16"] = "uint8_below_255_else_uint16"

    @property
    def heads(self) -> int:
        """Number of output channels of the network."""
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One configuration of a trained nnU-Net, as inference sees it.

    `patch` and `spacing` have two entries for a 2-D network (which runs slice by slice over the first axis) and three
    for a 3-D one, in the order after `transpose_forward`. `sigma_scale` is the Gaussian's sigma over the patch size.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    dataset: str
    plans: str
    configuration: str
    trainer: str
    channels: tuple[str, ...]
    previous_stage: str | None
    patch: tuple[int, ...]
    spacing: tuple[float, ...]
    transpose_forward: tuple[int, int, int]
    transpose_backward: tuple[int, int, int]
    normalization: tuple[Normalization, ...]
    resample_data: Resampling
    resample_segmentation: Resampling
    resample_probabilities: Resampling
    labels: Labels
    reader: Reader
    file_ending: str
    step_size: float = 0.5
    sigma_scale: float = 0.125

    def __post_init__(self) -> None:
        where = f"configuration {self.configuration}"
        if len(self.patch) not in (2, 3) or min(self.patch) < 1:
            raise ModelError("The patch size is not 2-D or 3-D.", got=self.patch, where=where)
        if len(self.spacing) != len(self.patch) or not all(0 < s < math.inf for s in self.spacing):
            raise ModelError(
                "The spacing does not fit the patch.",
                expected=f"{len(self.patch)} positive numbers",
                got=self.spacing,
                where=where,
            )
        for axes in (self.transpose_forward, self.transpose_backward):
            if sorted(axes) != [0, 1, 2]:
                raise ModelError(
                    "A transpose is no permutation.", expected="0, 1, 2 in any order", got=axes, where=where
                )
        if tuple(self.transpose_forward[i] for i in self.transpose_backward) != (0, 1, 2):
            raise ModelError(
                "The two transposes do not undo each other.",
                where=where,
                got=(self.transpose_forward, self.transpose_backward),
            )
        if len(self.normalization) != len(self.channels) or not self.channels:
            raise ModelError(
                "Channels and normalisation schemes differ in number.",
                expected=len(self.channels),
                got=len(self.normalization),
                where=where,
            )

    @property
    def dimensions(self) -> int:
        """2 or 3: the dimensions of the network."""
        return len(self.patch)

    @property
    def network_channels(self) -> int:
        """Input channels of the network: image channels, and one per foreground label of a previous stage."""
        return len(self.channels) + (len(self.labels.foreground) if self.previous_stage is not None else 0)


@dataclass(frozen=True, kw_only=True)
class KeepLargestComponent:
    """Of the union of `labels` only the largest connected component stays; the rest becomes `background`.

    Components of equal size all stay; voxels are neighbours that share a face, an edge or a corner.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["keep_largest_component"] = "keep_largest_component"
    labels: tuple[int, ...]
    background: int = 0


@dataclass(frozen=True, kw_only=True)
class NetworkRecord:
    """One ONNX file of a bundle: one fold in one precision. `parent` is the id of the network it was made from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    id: str
    fold: str
    file: str
    precision: Precision
    zero_point: Literal["none", "s8", "u8"]
    opset: int
    io: tuple[TensorSpec, ...]
    parent: str | None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Smallest, usual and largest input shape (B, C, *patch) that an engine takes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that running adds to an opened engine: on the host, and on the device per batch size.

    Activations, and the input and output of all windows that are under way at once.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    host: int | None
    device_per_batch: Mapping[str, int]
    measured: bool


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """How an engine was built, and what the machine must look like to run it.

    `file` is None where the engine is the network's ONNX file itself (ONNX Runtime, OpenVINO). `inference_precision`
    is what the backend computes in; it is set on every open and read back. `options` holds the backend's own settings
    (threads, streams, batch …), chosen at compile time; `device` holds what identifies the machine.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    network: str
    backend: str
    flavour: str
    version: str
    file: str | None
    precision: Precision
    inference_precision: str
    profile: Profile
    device: Mapping[str, str]
    options: Mapping[str, str | int | float | bool]
    memory: Memory


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def value_from_json(kind: type[T], data: Any) -> T:
    """A value of class `kind` from parsed JSON. Unknown and missing keys, and wrong types, raise pydantic's error."""
    value: T = _adapter(cast(Hashable, kind)).validate_python(data)
    return value


def json_from_value(value: Any) -> Any:
    """Plain dicts, lists and scalars from a value of this module."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: json_from_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_from_value(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [json_from_value(item) for item in value]
    return value
