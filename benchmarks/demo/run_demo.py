"""The main job on real data: compile the demo model, segment the brain, and hold the result against nnU-Net.

    python benchmarks/demo/run_demo.py --output .demo

Writes the bundle, the segmentation, nnU-Net's own segmentation, `overlay.png` and `result.json`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
NAMES = {1: "grey matter", 2: "white matter"}


def run(title: str, command: list[str]) -> float:
    """Runs a command, shows it, and returns its wall seconds; its failure ends the demo."""
    click.echo(f"\n$ {title}")
    started = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if process.returncode:
        raise click.ClickException(f"{title} ended with exit code {process.returncode}")
    return time.perf_counter() - started


def volume(path: Path) -> NDArray[Any]:
    """A NIfTI file as an array (Z, Y, X)."""
    import SimpleITK

    return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))


def overlay(image: NDArray[Any], ours: NDArray[Any], truth: NDArray[Any], path: Path) -> None:
    """Three planes through the brain: the image, trtbuild's segmentation on it, the reference labels on it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([(0, 0, 0, 0), "#3fa7d6", "#f79d5c"])
    planes = [("axial", 0, 85), ("coronal", 1, 110), ("sagittal", 2, 80)]
    figure, axes = pyplot.subplots(3, 3, figsize=(10, 10.6), facecolor="#111", layout="constrained")
    for row, (plane, axis, index) in zip(axes, planes, strict=True):
        slices = [np.flipud(np.take(v, index, axis=axis)) for v in (image, ours, truth)]
        for column, (title, labels) in zip(
            row, [("T1", None), ("trtbuild", slices[1]), ("labels", slices[2])], strict=True
        ):
            column.imshow(slices[0], cmap="gray", interpolation="nearest")
            if labels is not None:
                column.imshow(labels, cmap=colours, vmin=0, vmax=2, alpha=0.55, interpolation="nearest")
            column.set_title(f"{plane}, {title}", color="white", fontsize=10)
            column.axis("off")
    figure.suptitle("MNI152 brain: grey matter (blue), white matter (orange)", color="white")
    figure.savefig(path, dpi=110, facecolor=figure.get_facecolor())


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path(".demo"), show_default=True)
def main(output: Path) -> None:
    """Compile, predict, compare with nnU-Net, draw."""
    from trtbuild.accuracy import dice, differing_voxels

    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    bundle, python = output / "brain.trtb", [sys.executable, "-m", "trtbuild"]
    seconds = {
        "compile": run(
            f"trtbuild compile {MODEL.name} -o {bundle}", [*python, "compile", str(MODEL), "-o", str(bundle)]
        ),
        "predict": run(
            f"trtbuild predict {bundle} -i input -o {output}/trtbuild --disable_tta",
            [
                *python,
                "predict",
                str(bundle),
                "-i",
                str(HERE / "input"),
                "-o",
                str(output / "trtbuild"),
                "--disable_tta",
            ],
        ),
    }
    for name, switch in (("nnU-Net", []), ("nnU-Net, float32 accumulators", ["--float32"])):
        folder = output / ("nnunet_float32" if switch else "nnunet")
        command = [
            sys.executable,
            str(HERE.parent / "nnunet_predict.py"),
            str(output / "times.json"),
            *switch,
            "--",
            "-i",
            str(HERE / "input"),
            "-o",
            str(folder),
            "-m",
            str(MODEL),
            "-f",
            "0",
            "-device",
            "cpu",
            "--disable_tta",
            "--disable_progress_bar",
        ]
        seconds[name] = run(f"nnUNetv2_predict_from_modelfolder … ({name})", command)

    ours, truth = volume(output / "trtbuild" / "mni152.nii.gz"), volume(HERE / "labels" / "mni152.nii.gz")
    theirs = {name: volume(output / name / "mni152.nii.gz") for name in ("nnunet", "nnunet_float32")}
    result = {
        "seconds": seconds,
        "voxels": int(ours.size),
        "differing_voxels": {name: differing_voxels(ours, other) for name, other in theirs.items()},
        "dice_to_labels": {
            text: {"trtbuild": dice(ours, truth, label), "nnunet": dice(theirs["nnunet"], truth, label)}
            for label, text in NAMES.items()
        },
        "dice_to_nnunet": {text: dice(ours, theirs["nnunet"], label) for label, text in NAMES.items()},
    }
    (output / "result.json").write_text(json.dumps(result, indent=2))
    overlay(volume(HERE / "input" / "mni152_0000.nii.gz"), ours, truth, output / "overlay.png")
    show(result, output)


def show(result: dict[str, Any], output: Path) -> None:
    """The result in words."""
    seconds, differing = result["seconds"], result["differing_voxels"]
    click.echo(f"\nsegmentation   {output}/trtbuild/mni152.nii.gz   picture {output}/overlay.png")
    click.echo(
        f"agreement      {differing['nnunet_float32']} of {result['voxels']} voxels differ from nnU-Net with float32 accumulators,"
    )
    click.echo(f"               {differing['nnunet']} from stock nnU-Net (whose float16 accumulators cause them)")
    for name, values in result["dice_to_labels"].items():
        click.echo(
            f"Dice           {name}: trtbuild {values['trtbuild']:.4f}, nnU-Net {values['nnunet']:.4f} against the labels"
        )
    click.echo("               (the brain is the parent of the training copies: no claim of generalisation)")
    click.echo(
        f"whole command  trtbuild {seconds['predict']:.1f} s, nnU-Net {seconds['nnU-Net']:.1f} s (one run, no mirroring; "
        "benchmarks/results holds the measured ratios)"
    )


if __name__ == "__main__":
    main()
