"""nnU-Net itself as the reference of the parity tests, and how far two results are apart.

nnU-Net keeps its Gaussian, its accumulator and its weights in float16. That alone changes about 1e-4 of the voxels,
so that the reference is nnU-Net with float32 in those three places and nothing else changed (`accumulators`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import imageio.v3 as imageio
import nibabel
import nnunetv2.inference.predict_from_raw_data as raw
import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray


class _TorchWithOtherHalf:
    """The torch module, but for `half`: that is the one name by which nnU-Net says what it accumulates in."""

    def __init__(self, torch_module: ModuleType, dtype: torch.dtype) -> None:
        self._torch, self.half = torch_module, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


@contextlib.contextmanager
def accumulators(dtype: torch.dtype) -> Iterator[None]:
    """Inside, nnU-Net's sliding window holds Gaussian, accumulator and weights in `dtype` (its own is float16)."""
    original_torch, original_gaussian = raw.torch, raw.compute_gaussian
    gaussian = functools.partial(original_gaussian, dtype=dtype)
    gaussian.cache_clear = original_gaussian.cache_clear  # type: ignore[attr-defined]
    raw.torch, raw.compute_gaussian = _TorchWithOtherHalf(original_torch, dtype), gaussian
    try:
        yield
    finally:
        raw.torch, raw.compute_gaussian = original_torch, original_gaussian


class Float32Predictor(nnUNetPredictor):  # type: ignore[misc]
    """nnUNetPredictor with float32 accumulators."""

    def _internal_predict_sliding_window_return_logits(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with accumulators(torch.float32):
            return super()._internal_predict_sliding_window_return_logits(*args, **kwargs)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with so many threads inside. One is the default below: small networks gain next to nothing from more, waste
    much where other work wants the cores, and sum in an order that depends on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without nnU-Net's prints, and without NumPy's warnings about the mean of nothing (masked z-score of zeros)."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def empty_predictor(*, mirroring: bool, step_size: float = 0.5, float32_accumulators: bool = True) -> nnUNetPredictor:
    """A predictor on the CPU, not yet initialised."""
    kind = Float32Predictor if float32_accumulators else nnUNetPredictor
    with quiet():
        return kind(
            tile_step_size=step_size,
            use_gaussian=True,
            use_mirroring=mirroring,
            perform_everything_on_device=False,
            device=torch.device("cpu"),
            allow_tqdm=False,
        )


def nnunet_predictor(
    folder: Path, folds: Sequence[str], *, mirroring: bool, step_size: float = 0.5, float32_accumulators: bool = True
) -> nnUNetPredictor:
    """nnU-Net's predictor with the given folds ("0" … "4", "all") of a trained-model folder, on the CPU."""
    predictor = empty_predictor(mirroring=mirroring, step_size=step_size, float32_accumulators=float32_accumulators)
    with quiet():
        predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), "checkpoint_final.pth")
    return predictor


def nnunet_predict(
    predictor: nnUNetPredictor,
    files: Sequence[Path],
    out_truncated: Path,
    *,
    probabilities: bool = False,
    thread_count: int = 1,
) -> Path:
    """Segment one case through nnU-Net's own reading, preprocessing, prediction and export, in this process.

    Writes `out_truncated` + file ending (returned), with `probabilities` also .npz and .pkl beside it; and, as nnU-Net
    does, dataset.json, plans.json and predict_from_raw_data_args.json in the folder.
    """
    out_truncated.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), threads(thread_count):
        predictor.predict_from_files_sequential([[str(f) for f in files]], [str(out_truncated)], probabilities)
    return out_truncated.with_name(out_truncated.name + predictor.dataset_json["file_ending"])


def nnunet_preprocess(predictor: nnUNetPredictor, files: Sequence[Path]) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """The case as nnU-Net hands it to the sliding window, (C, Z, Y, X) float32, and its properties (crop, shapes …)."""
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    with quiet():
        image, _, properties = preprocessor.run_case(
            [str(f) for f in files], None, predictor.plans_manager, predictor.configuration_manager,
            predictor.dataset_json,
        )  # fmt: skip
    return image, properties


def nnunet_logits(predictor: nnUNetPredictor, image: NDArray[np.floating[Any]]) -> torch.Tensor:
    """Logits (heads, Z, Y, X) on the model's grid: mean over windows, mirror flips and folds."""
    with quiet(), threads(1):
        return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).cpu()


def segmentation_from_file(file: Path) -> NDArray[Any]:
    """The stored labels, in the file's own axis order and dtype."""
    if file.name.endswith((".nii", ".nii.gz")):
        return np.asarray(nibabel.load(file).dataobj)
    if file.suffix == ".png":
        return np.asarray(imageio.imread(file))
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(file))))


def differing_voxels(a: Path, b: Path) -> int:
    """Number of voxels in which two segmentation files differ. Raises ValueError if their shapes do."""
    first, second = segmentation_from_file(a), segmentation_from_file(b)
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {first.shape} and {second.shape}")
    return int(np.count_nonzero(first != second))


def dice(a: Path, b: Path, label: int) -> float:
    """2 |A and B| / (|A| + |B|) of one label; NaN where neither file has it (as nnU-Net's evaluation)."""
    first, second = segmentation_from_file(a) == label, segmentation_from_file(b) == label
    size = int(first.sum()) + int(second.sum())
    return 2 * int((first & second).sum()) / size if size else float("nan")


def geometry_differences(a: Path, b: Path) -> list[str]:
    """What differs between two files besides the values: shape, dtype, spacing, origin, direction or affine and codes.

    Numbers are compared exactly. Empty where both are the same.
    """
    first, second = _geometry(a), _geometry(b)
    keys = first.keys() | second.keys()
    return [
        f"{key}: {first.get(key)} and {second.get(key)}" for key in sorted(keys) if first.get(key) != second.get(key)
    ]


def _geometry(file: Path) -> dict[str, Any]:
    if file.name.endswith((".nii", ".nii.gz")):
        image = nibabel.load(file)
        header = image.header
        return {
            "shape": image.shape,
            "dtype": str(header.get_data_dtype()),
            "affine": image.affine.tolist(),
            "spacing": tuple(map(float, header.get_zooms())),
            "qform": (int(header["qform_code"]), header.get_qform().tolist()),
            "sform": (int(header["sform_code"]), header.get_sform().tolist()),
            "units": header.get_xyzt_units(),
            "scaling": tuple(map(float, (header["scl_slope"], header["scl_inter"]))).__repr__(),
        }
    if file.suffix == ".png":
        labels = imageio.imread(file)
        return {"shape": labels.shape, "dtype": str(labels.dtype)}
    image = sitk.ReadImage(str(file))
    return {
        "shape": image.GetSize(),
        "dtype": (image.GetPixelIDTypeAsString(), image.GetNumberOfComponentsPerPixel()),
        "spacing": image.GetSpacing(),
        "origin": image.GetOrigin(),
        "direction": image.GetDirection(),
    }
