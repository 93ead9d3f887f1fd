"""The two ways from an image in host memory to labels in host memory: nnU-Net's own, and trtbuild's device path."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trtbuild.bundle import open_bundle
from trtbuild.runtime import Member, Settings
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.case import prediction_on_device
from trtbuild.runtime.gpu.prepare import prepared_on_device
from trtbuild.runtime.gpu.shared import DeviceEngine, Enqueues, Gpu, engine_from_runner, opened_gpu
from trtbuild.runtime.nvrtc import kernels_cubin
from trtbuild.runtime.predictor import Clock
from trtbuild.runtime.select import open_runner
from trtbuild.source import spec_from_plans
from trtbuild.spec import ModelSpec

NNUNET = "nnunetv2.inference.predict_from_raw_data"


@dataclass(frozen=True, kw_only=True)
class Image:
    """(C, Z, Y, X) float32, and mm along z, y, x."""

    data: NDArray[np.float32]
    spacing: tuple[float, float, float]


def body(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Image:
    """One channel of Hounsfield units: a body of organs with noise, in air."""
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    plane = (y[:, None] / 0.8) ** 2 + (x[None] / 0.9) ** 2
    rng, data = np.random.default_rng(0), np.full(shape, -1024, dtype=np.float32)
    for k, height in enumerate(z):
        inside = plane < 1 - 0.3 * height**2
        data[k][inside] = (60 * np.sin(5 * plane + 3 * height) + rng.normal(40, 25, plane.shape))[inside]
    return Image(data=data[None], spacing=spacing)


@dataclass(frozen=True, kw_only=True, eq=False)
class DevicePath:
    """A model that is open on a GPU."""

    gpu: Gpu
    member: Member
    engine: DeviceEngine

    def predict(self, image: Image, engine: DeviceEngine | None = None) -> NDArray[Any]:
        """Labels (Z, Y, X), without mirroring."""
        spec = self.member.spec
        prepared = prepared_on_device(image.data, image.spacing, spec, self.gpu)
        settings, engines = Settings(mirroring=False), (engine or self.engine,)
        notes: list[str] = []
        prediction = prediction_on_device(
            prepared, self.member, settings, engines, self.gpu, None, notes.append, Clock()
        )
        if notes:  # then this is not what was to be measured
            raise RuntimeError("; ".join(notes))
        return prediction.segmentation


@contextmanager
def device_path(model: Path, bundle: Path | None) -> Iterator[DevicePath]:
    """A trained-model folder on the first GPU: the TensorRT engine of a bundle of it, or its torch network."""
    spec = spec_of(model)
    with ExitStack() as stack:
        device = stack.enter_context(opened_device())
        gpu = stack.enter_context(opened_gpu(device, kernels_cubin(device.capability)))
        if bundle is None:
            from torch_engine import on_gpu

            engine = on_gpu(torch_network(model, spec), spec).engine()
        else:
            manifest = open_bundle(bundle).manifest
            record = manifest.engines[0]
            runner = stack.enter_context(open_runner(record, bundle / str(record.file), gpu=gpu))
            engine = engine_from_runner(cast(Enqueues, runner), record)
        yield DevicePath(gpu=gpu, member=Member(spec=spec, runners=(engine.runner,), mirror_axes=()), engine=engine)


def spec_of(model: Path) -> ModelSpec:
    """Of a trained-model folder TRAINER__PLANS__CONFIGURATION."""
    trainer, _, configuration = model.name.split("__")
    plans, dataset = (json.loads((model / f"{name}.json").read_text()) for name in ("plans", "dataset"))
    return spec_from_plans(plans, dataset, configuration=configuration, trainer=trainer)


def torch_network(model: Path, spec: ModelSpec) -> Any:
    """The network of fold 0 as nnU-Net builds it, without nnU-Net."""
    from trtbuild.source.architecture import architecture_from_plans
    from trtbuild.source.checkpoint import load_checkpoint
    from trtbuild.source.network import load_weights, network_from_architecture

    plans = json.loads((model / "plans.json").read_text())
    checkpoint = load_checkpoint(model / "fold_0" / "checkpoint_final.pth", trust=False)
    network = network_from_architecture(architecture_from_plans(plans, spec.configuration), spec, trust=False)
    load_weights(network, checkpoint.weights, spec, str(model))
    return network


def nnunet_predictor(model: Path, device: str) -> Any:
    """nnU-Net's predictor with its defaults, without mirroring, everything on the device; cudnn chooses by timing."""
    import torch

    torch.backends.cudnn.benchmark = True
    predictor = import_module(NNUNET).nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=False, perform_everything_on_device=True,
        device=torch.device(device), verbose=False, verbose_preprocessing=False, allow_tqdm=False,
    )  # fmt: skip
    predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,), checkpoint_name="checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    return predictor


def nnunet_labels(predictor: Any, image: Image) -> NDArray[Any]:
    """Labels (Z, Y, X) by nnU-Net's own functions."""
    return np.asarray(predictor.predict_single_npy_array(image.data, {"spacing": list(image.spacing)}))


def seconds(work: Any) -> tuple[float, Any]:
    """Wall time of a call that ends on the host, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result
