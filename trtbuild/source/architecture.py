"""plans.json: which network class is built, and with what arguments. Strings only: nothing is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trtbuild.source.fields import Field
from trtbuild.source.plans import configuration_from_plans

LEGACY_CLASSES = {
    "PlainConvUNet": ("dynamic_network_architectures.architectures.unet.PlainConvUNet", "n_conv_per_stage"),
    "ResidualEncoderUNet": ("dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
                            "n_blocks_per_stage"),
}  # fmt: skip


Fact = Literal["channels", "heads", "patch", "no deep supervision"]


def _facts_of_a_unet() -> Mapping[str, Fact]:
    return {"input_channels": "channels", "num_classes": "heads", "deep_supervision": "no deep supervision"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network class by dotted name.

    The arguments named in `imported` are dotted names (or None) themselves. `from_spec` names the arguments that are
    facts of the model: input channels, heads, patch, and False for deep supervision.
    """

    name: str
    arguments: Mapping[str, Any]
    imported: tuple[str, ...]
    where: str
    from_spec: Mapping[str, Fact] = field(default_factory=_facts_of_a_unet)


def architecture_from_plans(plans: Mapping[str, Any], configuration: str) -> Architecture:
    """The architecture of a configuration; plans before nnU-Net 2.3 are converted as `ConfigurationManager` does."""
    settings = configuration_from_plans(Field(plans, "plans.json"), configuration)
    if "architecture" not in settings.entries():
        return _legacy_architecture(settings)
    architecture = settings["architecture"]
    arguments = architecture["arch_kwargs"]
    imported = tuple(name.text() for name in architecture["_kw_requires_import"].items())
    for name in imported:
        if arguments[name].value is not None:
            arguments[name].text()
    return Architecture(name=architecture["network_class_name"].text(), arguments=dict(arguments.entries()),
                        imported=imported, where=architecture.path)  # fmt: skip


def _legacy_architecture(settings: Field) -> Architecture:
    """nnunetv2 2.8.1, plans_handler.py, `ConfigurationManager.__init__`.

    It names `architectures.residual_unet.ResidualEncoderUNet`, which no release of dynamic_network_architectures has;
    nnU-Net then finds the class in `architectures.unet`, which is the name used here.
    """
    name = settings["UNet_class_name"].one_of(LEGACY_CLASSES, "architecture of plans before nnU-Net 2.3")
    dotted, blocks = LEGACY_CLASSES[name]
    stages = len(settings["n_conv_per_stage_encoder"].items())
    dimensions = len(settings["patch_size"].items())
    base, most = (settings[key].integer(1, 1 << 16) for key in ("UNet_base_num_features", "unet_max_num_features"))
    arguments = {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, most) for stage in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": settings["conv_kernel_sizes"].value,
        "strides": settings["pool_op_kernel_sizes"].value,
        blocks: settings["n_conv_per_stage_encoder"].value,
        "n_conv_per_stage_decoder": settings["n_conv_per_stage_decoder"].value,
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(name=dotted, arguments=arguments, imported=("conv_op", "norm_op", "dropout_op", "nonlin"),
                        where=settings.path)  # fmt: skip
