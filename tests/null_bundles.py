"""Bundles whose engine is the null runner: real files and a real run around a network that takes no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from bundle_samples import CONTENTS, network
from specs import make_spec

from trtbuild.bundle import Stage, write_bundle
from trtbuild.spec import BuildRecord, KeepLargestComponent, Memory, ModelSpec, NoNormalization, Profile

END = ".nii.gz"
SPEC = make_spec(normalization=(NoNormalization(),))
FIRST = replace(SPEC, configuration="3d_lowres", spacing=(2.0, 2.0, 2.0))
SECOND = replace(SPEC, configuration="3d_cascade_fullres", previous_stage="3d_lowres")


def null_bundle(
    path: Path,
    *specs: ModelSpec,
    folds: Sequence[str] = ("0",),
    postprocessing: tuple[KeepLargestComponent, ...] = (),
    note: str = "",
) -> Path:
    """A bundle of one stage per spec (SPEC if there is none). Another `note` gives another identity."""
    stages, engines = [], []
    for number, spec in enumerate(specs or (SPEC,)):
        names = [f"{number}{fold}" if len(specs) > 1 else fold for fold in folds]
        networks = [replace(network(name, spec=spec), fold=fold) for name, fold in zip(names, folds, strict=True)]
        stages.append(Stage(spec=spec, mirror_axes=(0,), networks=tuple(networks)))
        engines += [null_engine(one.id, spec) for one in networks]
    contents = replace(
        CONTENTS, stages=tuple(stages), engines=tuple(engines), goldens=(), calibrations=(),
        postprocessing=postprocessing, extensions={"note": note},
    )  # fmt: skip
    files: dict[str, bytes | Path] = {n.file: b"null" for stage in stages for n in stage.networks}
    write_bundle(path, contents, files | {"plans.json": b"{}", "dataset.json": b"{}"}, overwrite=False)
    return path


def null_engine(network_id: str, spec: ModelSpec) -> BuildRecord:
    shape = (1, spec.network_channels, *spec.patch)
    return BuildRecord(
        network=network_id, backend="null", flavour="null", version="0", file=None, precision="fp32",
        inference_precision="f32", profile=Profile(min=shape, opt=shape, max=shape), device={},
        options={"threads": 1, "streams": 1, "batch": 1, "heads": spec.labels.heads},
        memory=Memory(host=None, device_per_batch={}, measured=False),
    )  # fmt: skip


def write_cases(folder: Path, *names: str, shape: tuple[int, int, int] = (9, 14, 11), **more: Any) -> Path:
    """One-channel images `NAME_0000.nii.gz`, each of other values between 0 and 2.4, which the null runner rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rng = np.random.default_rng(list(name.encode()))
        image = sitk.GetImageFromArray(rng.uniform(0, 2.4, shape).astype(np.float32))
        image.SetSpacing(more.get("spacing", (1.2, 0.9, 1.1)))
        sitk.WriteImage(image, str(folder / f"{name}_0000{END}"), True)
    return folder
