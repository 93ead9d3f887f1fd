"""Makes everything under benchmarks/demo again: the brain, its labels, the training copies, the trained model.

    python benchmarks/demo/make_demo.py --work /tmp/trtbuild-demo

Needs nnunetv2, torch and nilearn (`pip install -c tests/constraints.txt nnunetv2 torch nilearn`); takes about
fifteen minutes on two cores. The data are the MNI ICBM152 2009 template and its tissue probability maps as nilearn
ships them (see LICENSE-MNI.txt); the training cases are varied copies of that template (affine, bias field, contrast,
noise), so the template is the parent of every training case and its Dice says nothing about generalisation.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
DATASET = "Dataset501_MNI152Tissue"
SPACING_MM = 1.5
CASES = 6
KEPT_CASES = 3  # preprocessed cases that go into the repository, for calibration
SEED = 20090905

PATCH = [64, 64, 64]
FEATURES = [16, 32, 64, 128]
EPOCHS, ITERATIONS = 10, 25


def template() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """The T1 brain (X, Y, Z) in 0..255, its (grey, white) probabilities (2, X, Y, Z), and the 4x4 affine in mm."""
    import nibabel
    import nilearn.datasets

    folder = Path(nilearn.datasets.__file__).parent / "data"

    def load(kind: str) -> nibabel.Nifti1Image:
        return nibabel.load(folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")

    t1 = load("t1")
    tissue = np.stack([load(kind).get_fdata() for kind in ("gm", "wm")]) / 255.0
    return t1.get_fdata().astype(np.float32), tissue.astype(np.float32), t1.affine


def labels_from_probabilities(tissue: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0 background, 1 grey matter, 2 white matter: the likeliest of (1 - grey - white, grey, white)."""
    return np.concatenate([1.0 - tissue.sum(0, keepdims=True), tissue]).argmax(0).astype(np.uint8)


def varied_copy(
    t1: NDArray[np.float32], tissue: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One training case: rotated, scaled and sheared, another contrast, a smooth bias field, noise inside the head."""
    from scipy.ndimage import affine_transform, zoom
    from scipy.spatial.transform import Rotation

    matrix = Rotation.from_euler("xyz", rng.uniform(-15, 15, 3), degrees=True).as_matrix()
    matrix = matrix @ np.diag(rng.uniform(0.88, 1.12, 3)) + np.triu(rng.uniform(-0.05, 0.05, (3, 3)), 1)
    centre = (np.array(t1.shape) - 1) / 2
    offset = centre - matrix @ centre + rng.uniform(-6, 6, 3)

    def moved(volume: NDArray[np.float32]) -> NDArray[np.float32]:
        return affine_transform(volume, matrix, offset, order=1)

    image = moved(t1)
    head = image > 1
    coarse = rng.normal(0, 0.12, (4, 4, 4))
    bias = np.exp(zoom(coarse, np.array(image.shape) / 4, order=3)[tuple(slice(0, n) for n in image.shape)])
    image = 255 * (image / 255) ** rng.uniform(0.75, 1.35) * bias + rng.normal(0, rng.uniform(1, 5), image.shape)
    image = np.where(head, np.clip(image, 1, 255), 0)
    return image.astype(np.uint8), labels_from_probabilities(np.stack([moved(t) for t in tissue]))


def write_raw_dataset(raw: Path) -> None:
    """The training cases under nnUNet_raw, and the held-out template under benchmarks/demo."""
    import nibabel

    t1, tissue, affine = template()
    (HERE / "input").mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(t1.astype(np.uint8), affine), HERE / "input" / "mni152_0000.nii.gz")
    (HERE / "labels").mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels_from_probabilities(tissue), affine), HERE / "labels" / "mni152.nii.gz")

    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    for case in range(CASES):
        image, labels = varied_copy(t1, tissue, rng)
        nibabel.save(nibabel.Nifti1Image(image, affine), raw / "imagesTr" / f"copy{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, affine), raw / "labelsTr" / f"copy{case}.nii.gz")
    (raw / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "T1"},
                "labels": {"background": 0, "grey_matter": 1, "white_matter": 2},
                "numTraining": CASES,
                "file_ending": ".nii.gz",
                "overwrite_image_reader_writer": "SimpleITKIO",
            },
            indent=2,
        )
    )


def plan_and_preprocess(preprocessed: Path) -> None:
    """nnU-Net's own fingerprint, plans and preprocessing; the 3d_fullres network is made small by editing the plans."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    api.extract_fingerprints([501], num_processes=2, check_dataset_integrity=True)
    api.plan_experiments([501], overwrite_target_spacing=(SPACING_MM,) * 3)
    plans_file = preprocessed / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"], configuration["batch_size"] = PATCH, 2
    stages = len(FEATURES)
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=FEATURES,
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )
    plans["configurations"] = {"3d_fullres": configuration}
    plans_file.write_text(json.dumps(plans, indent=4))
    api.preprocess([501], "nnUNetPlans", configurations=["3d_fullres"], num_processes=[2])


def train() -> Path:
    """Trains fold 0 with nnUNetTrainer itself, only shorter; returns the model folder."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.manual_seed(SEED)
    np.random.seed(SEED % 2**32)
    trainer = get_trainer_from_args("501", "3d_fullres", 0, device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = EPOCHS, ITERATIONS, 2
    trainer.run_training()
    return Path(trainer.output_folder_base)


def keep_model(model: Path) -> None:
    """Copies the model folder as nnU-Net left it, without the optimizer's state (which inference never reads)."""
    import torch

    target = HERE / "model" / model.name
    shutil.rmtree(target, ignore_errors=True)
    (target / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        shutil.copy(model / name, target / name)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    checkpoint["optimizer_state"] = None
    torch.save(checkpoint, target / "fold_0" / "checkpoint_final.pth")
    shutil.copy(model / "fold_0" / "progress.png", target / "fold_0" / "progress.png")


def keep_preprocessed(preprocessed: Path) -> None:
    """Keeps the first preprocessed training cases, as nnU-Net wrote them (the pickles beside them stay out)."""
    target = HERE / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres"
    shutil.rmtree(target.parent, ignore_errors=True)
    target.mkdir(parents=True)
    source = preprocessed / "nnUNetPlans_3d_fullres"
    for case in range(KEPT_CASES):
        for name in (f"copy{case}.b2nd", f"copy{case}_seg.b2nd"):
            shutil.copy(source / name, target / name)
    for name in ("dataset.json", "nnUNetPlans.json"):
        shutil.copy(preprocessed / name, target.parent / name)


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder for nnU-Net's own data (about 1 GB)."
)
def main(work: Path) -> None:
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ.setdefault("nnUNet_n_proc_DA", "2")
    os.environ["nnUNet_compile"] = "0"
    write_raw_dataset(work / "raw" / DATASET)
    plan_and_preprocess(work / "preprocessed" / DATASET)
    keep_preprocessed(work / "preprocessed" / DATASET)
    keep_model(train())


if __name__ == "__main__":
    main()
