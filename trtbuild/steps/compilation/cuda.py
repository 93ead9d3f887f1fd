"""Records for ONNX Runtime's CUDA provider: nothing is built, the engine is the network's ONNX file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trtbuild.config import CompileConfig
from trtbuild.engine.tensorrt import shapes_from_io
from trtbuild.engine.tensorrt.record import COMPUTED
from trtbuild.errors import EngineError, MissingExtra
from trtbuild.spec import BuildRecord, Memory, NetworkRecord, Profile
from trtbuild.steps.compilation.backends import CUDA_BACKEND, Backends
from trtbuild.steps.compilation.engines import EngineJob, check_against_golden
from trtbuild.steps.compilation.networks import Report


@dataclass(frozen=True, kw_only=True)
class CudaEngine:
    """The record; `unrun` says why it was not run at compile time, None where it was and computed what it should."""

    record: BuildRecord
    unrun: str | None


def cuda_engines(
    config: CompileConfig, backends: Backends, jobs: tuple[EngineJob, ...], report: Report
) -> Iterable[CudaEngine]:
    """One per network for GPUs, if they are asked for.

    Where there is a GPU and an ONNX Runtime for it, each is held to its golden; else it is said why it was not.

    Raises:
        EngineError: it computes something else.
    """
    if not backends.cuda:
        return
    for job in (job for job in jobs if job.on_device):
        record = _record(config, job.network)
        reason = _misfit(record, job, report)
        if reason is not None:
            report(f"{job.network.id} was not run on a GPU here: {reason}")
        yield CudaEngine(record=record, unrun=reason)


def _record(config: CompileConfig, network: NetworkRecord) -> BuildRecord:
    """For any GPU; with the version that is installed here, whichever hardware it is for."""
    from trtbuild.runtime.onnxruntime import onnxruntime_version

    (shapes,) = shapes_from_io(network.io[:1], config.tensorrt).values()
    return BuildRecord(
        network=network.id,
        backend=CUDA_BACKEND,
        flavour="cuda",
        version=onnxruntime_version(),
        file=None,
        precision=network.precision,
        inference_precision=COMPUTED[network.precision],
        profile=Profile(min=shapes[0], opt=shapes[1], max=shapes[2]),
        device={},
        options={},
        memory=Memory(host=None, device_per_batch={}, measured=False),
    )


def _misfit(record: BuildRecord, job: EngineJob, report: Report) -> str | None:
    """Runs the network and holds it to its golden; why this machine cannot, else None."""
    from trtbuild.runtime.select import open_runner

    try:
        runner = open_runner(record, job.model)
    except (EngineError, MissingExtra) as error:
        return " ".join(str(error).split())
    with runner:
        check_against_golden(record, job, runner, report)
    return None
