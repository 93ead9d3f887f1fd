"""The transformers of nnU-Net's Primus trainers, which look at nothing in the plans but the patch size.

From nnunetv2 2.8.1, `training/nnUNetTrainer/primus/primus_trainers.py`. The classes are those of
dynamic_network_architectures, which needs timm and a torchvision that fits torch for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtbuild.source.architecture import Architecture

MODULE = "dynamic_network_architectures.architectures.primus"
COMMON: Mapping[str, Any] = {
    "patch_embed_size": (8, 8, 8), "drop_path_rate": 0.2, "scale_attn_inner": True, "init_values": 0.1,
}  # fmt: skip
# embed_dim, eva_depth, eva_numheads of the first version, whose class knows no sizes by name
FIRST = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}

# trainer -> size of the first version, or class of a later one
TRAINERS: Mapping[str, str] = {
    **{f"nnUNet_Primus_{size}_Trainer": size for size in FIRST},
    "nnUNet_Primus_M_Trainer_BS8": "M",
    "nnUNet_Primus_M_Trainer_BS8_2e4": "M",
    "_Primus_S_96_BS1": "S",
    "_Primus_B_96_BS1": "B",
    "_Primus_M_96_BS1": "M",
    "_Primus_L_48_BS1": "L",
    **{f"nnUNet_PrimusV{version}{size}_Trainer": f"PrimusV{version}{size}" for version in (2, 3) for size in FIRST},
}


def primus_of_trainer(trainer: str, where: str) -> Architecture:
    """The architecture of one of `TRAINERS`; `where` names the configuration in messages."""
    kind = TRAINERS[trainer]
    if kind not in FIRST:
        return Architecture(
            name=f"{MODULE}.{kind}", arguments=COMMON, imported=(), where=where,
            from_spec={"input_channels": "channels", "output_channels": "heads", "input_shape": "patch"},
        )  # fmt: skip
    width, depth, attention_heads = FIRST[kind]
    return Architecture(
        name=f"{MODULE}.Primus", imported=(), where=where,
        arguments={**COMMON, "embed_dim": width, "eva_depth": depth, "eva_numheads": attention_heads},
        from_spec={"input_channels": "channels", "num_classes": "heads", "input_shape": "patch"},
    )  # fmt: skip
