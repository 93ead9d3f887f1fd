"""Trainers by name, and what each does to the architecture of the plans.

nnU-Net builds the network through the trainer's `build_network_architecture`. A trainer that only swaps, say, the
nonlinearity leaves every weight name as it is: loading succeeds and the segmentations are quietly wrong. So a trainer
is either in these tables, made from nnunetv2 2.8.1 (`training/nnUNetTrainer/**`), or the user has to vouch for it.
"""

from __future__ import annotations

import dataclasses
import re

from trtbuild.errors import ModelError
from trtbuild.source import primus
from trtbuild.source.architecture import Architecture

# These inherit nnUNetTrainer.build_network_architecture: exactly what the plans say.
PLANS_ARCHITECTURE = frozenset({
    "nnUNetTrainer", "nnUNetTrainerAdam", "nnUNetTrainerAdam1en3", "nnUNetTrainerAdam3en4", "nnUNetTrainerAdan",
    "nnUNetTrainerAdan1en1", "nnUNetTrainerAdan1en3", "nnUNetTrainerAdan3en4", "nnUNetTrainerAdanCosAnneal",
    "nnUNetTrainerBenchmark_5epochs", "nnUNetTrainerBenchmark_5epochs_noDataLoading", "nnUNetTrainerCELoss",
    "nnUNetTrainerCELoss_5epochs", "nnUNetTrainerCosAnneal", "nnUNetTrainerDA5", "nnUNetTrainerDA5Segord0",
    "nnUNetTrainerDA5_10epochs", "nnUNetTrainerDA5ord0", "nnUNetTrainerDiceCELoss_noSmooth",
    "nnUNetTrainerDiceLoss", "nnUNetTrainerDiceTopK10Loss", "nnUNetTrainerNoDA", "nnUNetTrainerNoDeepSupervision",
    "nnUNetTrainerNoMirroring", "nnUNetTrainerTopk10Loss", "nnUNetTrainerTopk10LossLS01",
    "nnUNetTrainerVanillaAdam", "nnUNetTrainerVanillaAdam1en3", "nnUNetTrainerVanillaAdam3en4",
    "nnUNetTrainer_100epochs", "nnUNetTrainer_10epochs", "nnUNetTrainer_1epoch", "nnUNetTrainer_2000epochs",
    "nnUNetTrainer_2000epochs_NoMirroring", "nnUNetTrainer_20epochs", "nnUNetTrainer_250epochs",
    "nnUNetTrainer_250epochs_NoMirroring", "nnUNetTrainer_4000epochs", "nnUNetTrainer_4000epochs_NoMirroring",
    "nnUNetTrainer_500epochs", "nnUNetTrainer_50epochs", "nnUNetTrainer_5epochs", "nnUNetTrainer_750epochs",
    "nnUNetTrainer_8000epochs", "nnUNetTrainer_8000epochs_NoMirroring", "nnUNetTrainer_DASegOrd0",
    "nnUNetTrainer_DASegOrd0_NoMirroring", "nnUNetTrainer_noDummy2DDA", "nnUNetTrainer_onlyMirror01",
    "nnUNetTrainer_onlyMirror01_1500ep", "nnUNetTrainer_onlyMirror01_DA5", "nnUNetTrainer_onlyMirror01_DASegOrd0",
    "nnUNetTrainer_probabilisticOversampling", "nnUNetTrainer_probabilisticOversampling_010",
    "nnUNetTrainer_probabilisticOversampling_033", "nnUNetTrainer_warmup", "nnUNet_Trainer_BS8",
})  # fmt: skip
BATCH_NORM = frozenset({"nnUNetTrainerBN"})

# Abstract: nobody trains with it.
NOT_SUPPORTED = frozenset({"AbstractPrimus"})


def architecture_of_trainer(architecture: Architecture, trainer: str, *, assume_plans: bool) -> Architecture:
    """The architecture that the trainer builds from the plans' one.

    Args:
        architecture: from the plans.
        trainer: class name, from the checkpoint.
        assume_plans: the user's word that an unknown trainer builds what the plans say (`--assume-plans-architecture`).

    Raises:
        ModelError: the trainer is unknown and nobody vouched for it, or it builds a network of its own.
    """
    if trainer in PLANS_ARCHITECTURE:
        return architecture
    if trainer in BATCH_NORM:
        return _with_batch_norm(architecture)
    if trainer in primus.TRAINERS:
        return primus.primus_of_trainer(trainer, architecture.where)
    if trainer in NOT_SUPPORTED:
        raise ModelError(f"{trainer} builds no network itself.", got=trainer, where="checkpoint: trainer_name",
                         expected="a trainer that can train",
                         hint="name the function that builds the network with --network")  # fmt: skip
    if assume_plans:
        return architecture
    raise ModelError(
        f"The trainer {trainer} is not known, so neither is the network that it builds.",
        expected="a trainer of nnunetv2 2.8.1",
        got=trainer,
        where="checkpoint: trainer_name",
        hint="a trainer may change the network without changing a weight's name, for example its nonlinearity: "
        "everything would load and the segmentations would be wrong. If you know that its "
        "build_network_architecture is nnUNetTrainer's, pass --assume-plans-architecture; if it is another, hand it "
        "over with --network my_trainers:MyTrainer.build_network_architecture",
    )


def is_known(trainer: str) -> bool:
    """Whether the tables say what this trainer builds."""
    return trainer in PLANS_ARCHITECTURE | BATCH_NORM | NOT_SUPPORTED or trainer in primus.TRAINERS


def _with_batch_norm(architecture: Architecture) -> Architecture:
    """nnUNetTrainerBN.build_network_architecture."""
    convolution = re.search(r"\.Conv([123])d$", str(architecture.arguments.get("conv_op")))
    if convolution is None or "norm_op" not in architecture.arguments:
        raise ModelError("nnUNetTrainerBN swaps the norm of a default architecture, which this is not.",
                         expected="conv_op and norm_op among the arguments", got=sorted(architecture.arguments),
                         where=architecture.where)  # fmt: skip
    norm = {"norm_op": f"torch.nn.modules.batchnorm.BatchNorm{convolution.group(1)}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True}}  # fmt: skip
    return dataclasses.replace(architecture, arguments={**architecture.arguments, **norm})
