"""What goes into the bundle: its list of networks, engines, calibrations, gates and goldens, and all files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.bundle import Contents, Golden
from trtbuild.spec import BuildRecord
from trtbuild.steps.compilation.backends import CUDA_BACKEND
from trtbuild.steps.compilation.cuda import CudaEngine
from trtbuild.steps.compilation.device import DeviceEngine
from trtbuild.steps.compilation.engines import EngineJob
from trtbuild.steps.compilation.golden import GoldenCase
from trtbuild.steps.compilation.networks import Networks

if TYPE_CHECKING:
    from trtbuild.steps.precision.job import TypedNetwork


def bundle_contents(
    networks: Networks,
    case: GoldenCase | None,
    typed: tuple[TypedNetwork, ...],
    usable: tuple[TypedNetwork, ...],
    jobs: tuple[EngineJob, ...],
    engines: tuple[BuildRecord, ...],
    plans: tuple[DeviceEngine, ...],
    on_cuda: tuple[CudaEngine, ...],
) -> tuple[Contents, Mapping[str, bytes | Path]]:
    """bundle.json and the files of the bundle. A typed network stands behind the one it comes from.

    Args:
        networks: FP32, with their goldens.
        case: the golden case.
        typed: whose calibrations and gates are kept, passed or not.
        usable: what engines were built from besides `networks`.
        jobs: of all engines.
        engines: of CPU backends.
        plans: of TensorRT.
        on_cuda: of ONNX Runtime's CUDA provider.
    """
    used = {job.network.id: job for job in jobs}
    lower = [network for network in usable if network.content is not None and network.record.id in used]
    goldens, files = _goldens(networks, case, {name: job.golden[1] for name, job in used.items()}, lower)
    for network in typed:
        files |= network.files
    for plan in plans:
        files |= plan.files
    for network in lower:
        files[network.record.file] = network.content or b""
    stages = tuple(
        replace(stage, networks=(*stage.networks, *(network.record for network in lower
                                                    if network.record.parent in {n.id for n in stage.networks})))
        for stage in networks.stages
    )  # fmt: skip
    contents = Contents(
        stages=stages,
        engines=(*(plan.record for plan in plans), *(engine.record for engine in on_cuda), *engines),
        calibrations=tuple(network.calibration for network in typed if network.calibration is not None),
        gates=tuple(gate for network in typed for gate in network.gates),
        goldens=goldens,
        postprocessing=networks.postprocessing,
        provenance=networks.provenance,
        extensions=_extensions(usable, plans, on_cuda),
    )
    return contents, {**networks.files, **files}


def _extensions(
    usable: tuple[TypedNetwork, ...], plans: tuple[DeviceEngine, ...], on_cuda: tuple[CudaEngine, ...]
) -> dict[str, Any]:
    found: dict[str, Any] = {"tensorrt": _device_facts(usable, plans)} if plans else {}
    if on_cuda:
        found[CUDA_BACKEND] = {engine.record.network: {"unrun": engine.unrun} for engine in on_cuda}
    return found


def _device_facts(usable: tuple[TypedNetwork, ...], plans: tuple[DeviceEngine, ...]) -> dict[str, Any]:
    """Of each network for TensorRT: why its engine was not run when it was built (None: it was), its INT8 layers, what
    stayed in a higher precision and why, and which weights are lost in the lower one."""
    layers = {network.record.id: network.layers for network in usable if network.target == "device"}
    return {plan.record.network: {"unrun": plan.unrun, **layers[plan.record.network]} for plan in plans}


def _goldens(
    networks: Networks,
    case: GoldenCase | None,
    logits: Mapping[str, NDArray[np.float32]],
    lower: Sequence[TypedNetwork],
) -> tuple[tuple[Golden, ...], dict[str, bytes | Path]]:
    """The list of goldens and their `.npy` files: PyTorch's logits for FP32 networks, ONNX Runtime's for others."""
    goldens, files = [], dict[str, bytes | Path]()
    for name in (network.id for stage in networks.stages for network in stage.networks):
        stem = f"goldens/{name}"
        goldens.append(
            Golden(kind="patch", network=name, input=f"{stem}_input.npy", output=f"{stem}_logits.npy", spacing=None)
        )
        files[f"{stem}_input.npy"], files[f"{stem}_logits.npy"] = map(_npy, networks.goldens[name])
    for record in (network.record for network in lower):
        output = f"goldens/{record.id}_logits.npy"
        source = f"goldens/{record.parent}_input.npy"
        goldens.append(Golden(kind="patch", network=record.id, input=source, output=output, spacing=None))
        files[output] = _npy(logits[record.id])
    if case is not None:
        image, labels = "goldens/case_image.npy", "goldens/case_labels.npy"
        goldens.append(Golden(kind="case", network=None, input=image, output=labels, spacing=case.spacing))
        files[image], files[labels] = _npy(case.image), _npy(case.labels)
    return tuple(goldens), files


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
