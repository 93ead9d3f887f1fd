"""The TensorRT runner (GPU), for TensorRT 10, TensorRT 11 and TensorRT-RTX: what they lack is looked for.

A plan does not tell in which precision it computes, so that is the record's, and `details` says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.errors import EngineError, MissingExtra
from trtbuild.nvinfer import EXTRAS, MODULES, Backend, Nvinfer, nvinfer
from trtbuild.runtime.device import Device, check_device_usable, opened_device
from trtbuild.runtime.lanes import LaneRunner
from trtbuild.runtime.ports import input_from_ports, output_from_ports
from trtbuild.runtime.runner import RunnerInfo
from trtbuild.runtime.tensorrt_engine import LoadedEngine
from trtbuild.runtime.tensorrt_fit import check_gpu, check_version, check_weights, engine_content
from trtbuild.runtime.tensorrt_lanes import Slots, TensorRTLane
from trtbuild.spec import BuildRecord, Profile

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.shared import Gpu

PARALLEL = 1
"""Calls at once. `stream` has one lane more, so that copies run beside kernels; each lane holds its activations, and
two networks at once on one GPU gain little."""


class TensorRTRunner(LaneRunner):
    """A Runner, and the same engine for work that is on the GPU already.

    Opened for a Gpu, it `shares_memory` with the others there, and where it is `capturable` its calls may become CUDA
    graphs (`gpu.shared.OfGpu`).
    """

    def __init__(
        self,
        info: RunnerInfo,
        slots: Slots,
        profile: Profile,
        close: ExitStack,
        *,
        shares_memory: bool,
        capturable: bool,
    ) -> None:
        super().__init__(info, lambda background: TensorRTLane(slots), close.close)
        self._slots, self._profile = slots, profile
        self.shares_memory, self.capturable = shares_memory, capturable

    def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
        """Begin to compute logits from device memory to device memory.

        Args:
            source: device pointer to (batch, C, *patch) float32 in C order, which holds finite numbers.
            target: device pointer to room for (batch, heads, *patch) float32.
            stream: the handle of a CUDA stream of the primary context, not the default one. Calls on one stream must
                come from one thread at a time; each stream has its own activations, and that of the Gpu for which the
                engine was opened those of the Gpu.
            batch: from the profile's smallest to its largest.

        Both must stay as they are until the stream has come so far. NaN is not looked for.

        Raises:
            EngineError: closed, a batch outside the profile, or TensorRT refused.
            OutOfMemory: there is no memory for the activations.
        """
        self._opened()
        if not self._profile.min[0] <= batch <= self._profile.max[0]:
            raise EngineError("The batch is outside the engine's profile.", got=batch, where=self._info.backend,
                              expected=f"{self._profile.min[0]} to {self._profile.max[0]}")  # fmt: skip
        self._slots.enqueue(source, target, stream, batch)


def installed_version(backend: Backend) -> str:
    """The installed version, without loading it where its package can tell.

    Raises:
        MissingExtra: it is not installed.
    """
    name = MODULES[backend]
    if name not in sys.modules:
        if find_spec(name) is None:
            raise MissingExtra(name, EXTRAS[backend], "run its engines")
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:  # put there by something else than pip
            pass
    return nvinfer(backend).version


def usable_version(backend: Backend) -> str:
    """The version of a flavour that can run engines here; loads nothing where there is no driver.

    Raises:
        EngineError: no NVIDIA driver.
        MissingExtra: its package or pycuda is not installed.
    """
    check_device_usable()
    return installed_version(backend)


def open_tensorrt(
    record: BuildRecord, engine: Path, *, threads: int | None = None, gpu: Gpu | None = None
) -> TensorRTRunner:
    """Open a plan on the GPU; the file, the version and the GPU are judged by the record before it is loaded.

    A plan is code: open bundles that you trust. One that is version compatible brings its own runtime library, which
    TensorRT then loads.

    Args:
        record: `options.sha256` of the plan, `device` and `version` of the build, `profile` the shapes.
        engine: the plan.
        threads: has no meaning on a GPU beyond being a number of threads.
        gpu: whose device the engine is loaded on, and in whose memory `enqueue` computes; it outlives the runner. None
            takes the first GPU.

    Raises:
        EngineError: the plan has no weights, the file is not the one that was built, it was built by another version
            or for another GPU, there is no NVIDIA driver, or TensorRT refused.
        MissingExtra: the flavour's package or pycuda is not installed.
        OutOfMemory: the GPU has no memory left for weights or activations.
    """
    if threads is not None and threads < 1:
        raise EngineError("The number of threads is out of range.", expected=">= 1", got=threads)
    backend = _backend(record)
    check_weights(record)
    content = engine_content(engine, record)
    version = installed_version(backend)
    check_version(record, flavour=f"{backend}-{version.partition('.')[0]}", version=version)
    with ExitStack() as stack:
        device = stack.enter_context(opened_device()) if gpu is None else gpu.device
        notes = dict(check_gpu(record, name=device.name, capability=device.capability))
        library = nvinfer(backend)
        check_version(record, flavour=library.flavour, version=library.version)
        loaded = LoadedEngine(library, device, record, content, engine)
        stack.callback(loaded.close)
        info = _info(record, library, device, loaded, engine, notes)
        slots = Slots(device, loaded, record.profile, info, gpu)
        stack.callback(slots.close)
        return TensorRTRunner(
            info, slots, record.profile, stack.pop_all(), shares_memory=gpu is not None,
            capturable=gpu is not None and _capturable(record),
        )  # fmt: skip


def _capturable(record: BuildRecord) -> bool:
    """TensorRT-RTX captures graphs by itself; an engine that streams its weights waits for them in every call."""
    return record.backend == "tensorrt" and record.options.get("weight_streaming") is not True


def _backend(record: BuildRecord) -> Backend:
    for backend in MODULES:
        if record.backend == backend:
            return backend  # type: ignore[return-value]  # the keys are the literal's values
    raise EngineError("This is no TensorRT engine.", expected=" or ".join(MODULES), got=record.backend)


def _info(
    record: BuildRecord, library: Nvinfer, device: Device, loaded: LoadedEngine, engine: Path, notes: dict[str, str]
) -> RunnerInfo:
    inputs, outputs = loaded.ports()
    source, target = input_from_ports(inputs, record, engine), output_from_ports(outputs, record, engine)
    _check_profile(record, loaded.profile(source.name), engine)
    details = {
        "capability": device.capability,
        "driver": f"CUDA {device.driver}",
        "batch": str(record.profile.max[0]),
        "activation memory": f"{loaded.activation_memory} bytes per lane",
        "precision": "the record's: a plan does not tell its own",
        **loaded.details,
        **notes,
    }
    return RunnerInfo(
        backend=record.backend, version=library.version, inputs=source, outputs=target, parallel=PARALLEL,
        batch=record.profile.max[0], inference_precision=record.inference_precision, device=device.name,
        details=details,
    )  # fmt: skip


def _check_profile(record: BuildRecord, found: Sequence[tuple[int, ...]], engine: Path) -> None:
    wanted = (record.profile.min, record.profile.opt, record.profile.max)
    if tuple(found) != wanted:
        raise EngineError("The engine's profile is not the record's.", expected=wanted, got=tuple(found), where=engine)
