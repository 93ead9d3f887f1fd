"""Trains the two small models under tests/trained on the demo's preprocessed cases, from this repository alone.

    python tests/make_trained.py [--only resenc|2d] [--output DIR]

`resenc` is nnU-Net's residual encoder in 3D, `2d` its plain U-Net on axial slices; both segment grey and white matter
at 1.5 mm. Untrained weights will not do where lower precision is judged: their logits have no margin between labels.

Uses one thread: on one core of a shared two-core machine `2d` took five minutes and `resenc` twelve. The weights come
out bit for bit the same where the processor and the version of torch are the same.

The cases are varied copies of the MNI152 template (see benchmarks/demo/make_demo.py), so that the Dice of the template
itself says nothing about generalisation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from reference import threads

from trtbuild.bundle.swap import publish, staging

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "benchmarks" / "demo"
PREPROCESSED = DEMO / "preprocessed" / "Dataset501_MNI152Tissue"
FINGERPRINT = DEMO / "model" / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "dataset_fingerprint.json"
OUTPUT = REPOSITORY / "tests" / "trained"
TRAINER = "nnUNetTrainer"
FOREGROUND = (1, 2)
FOREGROUND_SHARE = 1 / 3  # of the patches are centred on a foreground voxel, as in nnU-Net's loader
REPORT_EVERY = 25  # iterations


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model: what its plans say, and how it is trained. `patch` is (Z, Y, X), in 2D (Y, X)."""

    configuration: str
    plans: str
    architecture: str
    patch: tuple[int, ...]
    features: tuple[int, ...]
    encoder: Mapping[str, Sequence[int]]
    decoder_convs: int
    batch: int
    iterations: int
    learning_rate: float = 2e-3
    seed: int

    @property
    def folder(self) -> str:
        """The name that nnU-Net gives the model folder."""
        return f"{TRAINER}__{self.plans}__{self.configuration}"


RECIPES: Mapping[str, Recipe] = {
    "resenc": Recipe(
        configuration="3d_fullres",
        plans="nnUNetResEncUNetMPlans",
        architecture="ResidualEncoderUNet",
        patch=(64, 64, 64),
        features=(8, 16, 32, 64),
        encoder={"n_blocks_per_stage": (1, 2, 2, 2)},
        decoder_convs=1,
        batch=2,
        iterations=350,
        seed=401,
    ),
    "2d": Recipe(
        configuration="2d",
        plans="nnUNetPlans",
        architecture="PlainConvUNet",
        patch=(96, 96),
        features=(16, 32, 64, 128),
        encoder={"n_conv_per_stage": (2, 2, 2, 2)},
        decoder_convs=2,
        batch=8,
        iterations=900,
        seed=402,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A preprocessed case. `image` (Z, Y, X) float32, `labels` (Z, Y, X) int64 of 0, 1, 2.

    `voxels` has for each foreground label the (n, 3) positions where it is.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.int64]
    voxels: Mapping[int, NDArray[np.int64]]


def plans_from_recipe(recipe: Recipe) -> dict[str, Any]:
    """plans.json: nnU-Net's plans of the demo's data set with another configuration."""
    plans = json.loads((PREPROCESSED / "nnUNetPlans.json").read_text())
    full: dict[str, Any] = plans["configurations"]["3d_fullres"]
    dimensions = len(recipe.patch)
    configuration = full | {
        # nnU-Net's residual planners share the data of nnUNetPlans, so this name does not follow the plans'
        "data_identifier": f"nnUNetPlans_{recipe.configuration}",
        "batch_size": recipe.batch,
        "patch_size": list(recipe.patch),
        "spacing": full["spacing"][-dimensions:],
        "median_image_size_in_voxels": full["median_image_size_in_voxels"][-dimensions:],
        "batch_dice": dimensions == 2,
        "architecture": _architecture(recipe, full["architecture"]),
    }
    return plans | {"plans_name": recipe.plans, "configurations": {recipe.configuration: configuration}}


def _architecture(recipe: Recipe, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The network's part of the plans; norm, bias and nonlinearity are those of the demo's `plain` U-Net."""
    dimensions, stages = len(recipe.patch), len(recipe.features)
    kept = {key: value for key, value in plain["arch_kwargs"].items() if key != "n_conv_per_stage"}
    changed = {
        "n_stages": stages,
        "features_per_stage": list(recipe.features),
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * stages,
        "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
        **{key: list(values) for key, values in recipe.encoder.items()},
        "n_conv_per_stage_decoder": [recipe.decoder_convs] * (stages - 1),
    }
    name = f"dynamic_network_architectures.architectures.unet.{recipe.architecture}"
    return {**plain, "network_class_name": name, "arch_kwargs": kept | changed}


def preprocessed_cases() -> list[Case]:
    """The demo's cases. Voxels outside the head (-1) are background, as in nnU-Net's training."""
    import blosc2

    folder = PREPROCESSED / "nnUNetPlans_3d_fullres"
    cases = []
    for file in sorted(folder.glob("*_seg.b2nd")):
        labels = np.maximum(blosc2.open(str(file), mode="r")[0].astype(np.int64), 0)
        image = blosc2.open(str(file.with_name(file.name.replace("_seg", ""))), mode="r")[0]
        voxels = {label: np.argwhere(labels == label) for label in FOREGROUND}
        cases.append(Case(image=image, labels=labels, voxels=voxels))
    return cases


def random_patch(
    case: Case, patch: tuple[int, ...], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Image and labels of one patch, (Z, Y, X), in 2D (Y, X) of one axial slice; flipped along axes drawn at random."""
    extent = np.array((1,) * (3 - len(patch)) + patch)
    last = np.array(case.image.shape) - extent
    start = rng.integers(0, last + 1)
    if rng.random() < FOREGROUND_SHARE:
        start = np.clip(rng.choice(case.voxels[int(rng.choice(FOREGROUND))]) - extent // 2, 0, last)
    window = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
    flipped = [axis for axis in range(len(patch)) if rng.random() < 0.5]
    image, labels = (np.flip(volume[window].reshape(patch), flipped) for volume in (case.image, case.labels))
    return image, labels


def varied(image: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Another contrast and brightness, and noise; the image is z-scored, so that its own spread is about 1."""
    noise = rng.normal(0, rng.uniform(0, 0.12), image.shape)
    return (image * rng.uniform(0.8, 1.25) + rng.uniform(-0.15, 0.15) + noise).astype(np.float32)


def random_batch(cases: Sequence[Case], recipe: Recipe, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, *patch) float32 and labels (B, 1, *patch) int64."""
    drawn = [random_patch(cases[rng.integers(len(cases))], recipe.patch, rng) for _ in range(recipe.batch)]
    images = np.stack([varied(image, rng) for image, _ in drawn])[:, None]
    labels = np.stack([labels for _, labels in drawn])[:, None]
    return torch.from_numpy(images), torch.from_numpy(labels)


def seeded_network(recipe: Recipe) -> torch.nn.Module:
    """The untrained network of the plans, as nnU-Net makes it."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = plans_from_recipe(recipe)["configurations"][recipe.configuration]["architecture"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return get_network_from_plans(
            architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
            input_channels=1, output_channels=1 + len(FOREGROUND), deep_supervision=False,
        )  # fmt: skip


def training_losses(network: torch.nn.Module, recipe: Recipe, iterations: int) -> Iterator[float]:
    """Trains `network` in place with nnU-Net's loss (Dice + cross entropy) and AdamW; yields the loss of every step."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": len(recipe.patch) == 2, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss_of = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=iterations, power=0.9)
    cases, rng = preprocessed_cases(), np.random.default_rng(recipe.seed)
    network.train()
    for _ in range(iterations):
        images, labels = random_batch(cases, recipe, rng)
        optimizer.zero_grad()
        loss = loss_of(network(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


def reported_means(losses: Iterator[float], name: str, iterations: int) -> list[float]:
    """Consumes the losses; prints and returns their means over every REPORT_EVERY iterations."""
    means, block = [], []
    for done, loss in enumerate(losses, start=1):
        block.append(loss)
        if len(block) == REPORT_EVERY or done == iterations:
            means.append(float(np.mean(block)))
            click.echo(f"{name}: {done}/{iterations} iterations, loss {means[-1]:.4f}")
            block = []
    return means


def write_model(network: torch.nn.Module, recipe: Recipe, losses: list[float], folder: Path) -> None:
    """The trained-model folder as nnU-Net leaves it, without the optimizer's state (which inference never reads)."""
    plans, dataset = plans_from_recipe(recipe), json.loads((PREPROCESSED / "dataset.json").read_text())
    (folder / "fold_0").mkdir(parents=True)
    for name, content in (("plans", plans), ("dataset", dataset)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=4))
    shutil.copy(FINGERPRINT, folder / FINGERPRINT.name)
    checkpoint = {
        "network_weights": network.state_dict(),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {"train_losses": losses},
        "_best_ema": None,
        "current_epoch": len(losses),
        "init_args": {
            "plans": plans, "configuration": recipe.configuration, "fold": 0, "dataset_json": dataset,
            "device": torch.device("cpu"),
        },
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": tuple(range(len(recipe.patch))),
    }  # fmt: skip
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


def make_trained(name: str, output: Path, iterations: int | None = None) -> Path:
    """Trains one of RECIPES; returns the model folder below `output`/`name`, which is replaced whole or not at all."""
    recipe = RECIPES[name]
    steps = recipe.iterations if iterations is None else iterations
    output.mkdir(parents=True, exist_ok=True)
    with threads(1):
        network = seeded_network(recipe)
        losses = reported_means(training_losses(network, recipe, steps), name, steps)
    with staging(output / name) as stage:
        write_model(network, recipe, losses, stage / "new" / recipe.folder)
        publish(stage, output / name)
    return output / name / recipe.folder


@click.command()
@click.option("--only", type=click.Choice(list(RECIPES)), help="Train this one only.")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="Default: tests/trained.")
@click.option("--iterations", type=click.IntRange(min=1), help="Default: as many as the models here had.")
def main(only: str | None, output: Path, iterations: int | None) -> None:
    """Train the small models that the tests of lower precision use."""
    for name in [only] if only else RECIPES:
        click.echo(f"{make_trained(name, output, iterations)}")


if __name__ == "__main__":
    main()
