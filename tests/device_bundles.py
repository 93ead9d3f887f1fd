"""Bundles with one engine for the CPU and one for the (fake) GPU, which compute the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundle_samples import CONTENTS, network
from fake_cuda import CUBIN, Cuda
from fake_engine import FakeEngine
from null_bundles import SPEC, null_engine

from trtbuild.bundle import Stage, write_bundle
from trtbuild.runtime import select
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.spec import BuildRecord, KeepLargestComponent, ModelSpec, Profile

BATCH = 4
ENGINE, PLAN = "engines/{}.engine", b"plan"


class NamedEngine(FakeEngine):
    """Knows the network and the GPU that it was opened for, and keeps a count of those that are not closed."""

    def __init__(
        self, spec: ModelSpec, cuda: Cuda, network_id: str, gpu: Gpu | None, opened: list[NamedEngine]
    ) -> None:
        super().__init__(spec, cuda, fold=int(network_id.split("_")[1]), batch=BATCH)
        self.network_id, self.gpu, self.opened = network_id, gpu, opened
        opened.append(self)

    def close(self) -> None:
        if self in self.opened:
            self.opened.remove(self)
            if self.gpu is not None and self.gpu.staging not in self.gpu.device._open:
                self.cuda.fault(f"{self.network_id} is closed after its GPU")
        super().close()


def device_bundle(
    path: Path,
    *specs: ModelSpec,
    folds: Sequence[str] = ("0",),
    axes: tuple[int, ...] = (0,),
    postprocessing: tuple[KeepLargestComponent, ...] = (),
    record: BuildRecord | None = None,
    plan: bytes = PLAN,
) -> Path:
    """A bundle of one stage per spec, with a TensorRT engine (`plan`; like `record`, where one is given) and a null
    engine per fold."""
    stages, engines = [], []
    for number, spec in enumerate(specs or (SPEC,)):
        names = [f"{number}{fold}" if len(specs) > 1 else fold for fold in folds]
        networks = [replace(network(name, spec=spec), fold=fold) for name, fold in zip(names, folds, strict=True)]
        stages.append(Stage(spec=spec, mirror_axes=axes, networks=tuple(networks)))
        engines += [_record(one.id, spec, record) for one in networks]
        engines += [null_engine(one.id, spec) for one in networks]
    engines.sort(key=lambda each: each.backend == "null")
    contents = replace(
        CONTENTS, stages=tuple(stages), engines=tuple(engines), goldens=(), calibrations=(),
        postprocessing=postprocessing, extensions={"note": path.name},
    )  # fmt: skip
    files: dict[str, bytes | Path] = {n.file: b"null" for stage in stages for n in stage.networks}
    files |= {each.file: plan for each in engines if each.file is not None}
    write_bundle(path, contents, files | {"plans.json": b"{}", "dataset.json": b"{}"}, overwrite=False)
    return path


def _record(network_id: str, spec: ModelSpec, like: BuildRecord | None) -> BuildRecord:
    if like is not None:
        return replace(like, network=network_id, file=ENGINE.format(network_id))
    shape = (spec.network_channels, *spec.patch)
    profile = Profile(min=(1, *shape), opt=(BATCH, *shape), max=(BATCH, *shape))
    return replace(
        null_engine(network_id, spec), backend="tensorrt", flavour="tensorrt-10", file=ENGINE.format(network_id),
        profile=profile, options={},
    )  # fmt: skip


def give_engines(patch: pytest.MonkeyPatch, cuda: Cuda, specs: dict[str, ModelSpec]) -> list[NamedEngine]:
    """From now on "tensorrt" and "null" open engines with the logits of `NamedEngine`, of these networks by their id.
    Returns those that are open on a GPU."""
    opened: list[NamedEngine] = []

    def on_gpu(record: BuildRecord, path: Path, threads: int | None, gpu: Gpu | None) -> NamedEngine:
        assert path.read_bytes() == PLAN
        assert gpu is not None
        return NamedEngine(specs[record.network], cuda, record.network, gpu, opened)

    def on_cpu(record: BuildRecord, path: Path, threads: int | None) -> NamedEngine:
        return NamedEngine(specs[record.network], cuda, record.network, None, [])

    patch.setitem(select.DEVICE_OPENERS, "tensorrt", on_gpu)  # type: ignore[arg-type]
    patch.setitem(select.OPENERS, "null", on_cpu)  # type: ignore[arg-type]
    give_cubin(patch)
    return opened


def give_cubin(patch: pytest.MonkeyPatch) -> None:
    """The kernels for the fake GPU, in place of those that NVRTC would compile."""
    patch.setattr("trtbuild.runtime.nvrtc.kernels_cubin", lambda capability: CUBIN)


def networks_of(*specs: ModelSpec, folds: Sequence[str] = ("0",)) -> dict[str, ModelSpec]:
    """The ids that `device_bundle` gives, with their specs."""
    stages = specs or (SPEC,)
    return {
        network(f"{number}{fold}" if len(stages) > 1 else fold).id: spec
        for number, spec in enumerate(stages)
        for fold in folds
    }


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 2.4, shape).astype(np.float32)
