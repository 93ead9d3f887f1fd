"""Whether a manifest fits together: everything that types alone do not say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from trtbuild.bundle.files import COMPILE_AGAIN, check_name, parents_of, short
from trtbuild.errors import BundleFormat, BundleKey, BundlePath, BundleTooLarge
from trtbuild.spec import BuildRecord, ModelSpec, NetworkRecord, TensorSpec

if TYPE_CHECKING:
    from trtbuild.bundle.manifest import FileEntry, Manifest, Provenance, Stage

FORMAT = 1
MAX_FILES = 10_000
"""A bundle has some tens of files: folds in several precisions, their engines, goldens, and nnU-Net's JSON files."""
MAX_FILE_SIZE = 64 << 30
"""Bytes. ONNX files end at 2 GiB and the largest engines are a few GiB."""
MAX_ELEMENTS = 2**31 - 1
"""Elements of one sample of a network's input or output; beyond, 32-bit indices of kernels and backends overflow."""
MAX_BATCH = 4096
"""Largest batch of a profile; measured ones are below 64."""

SHARED_BY_STAGES = ("dataset", "channels", "labels", "reader", "file_ending")
"""Facts in which the two stages of a cascade agree: they see the same image, and the labels of the first are an input
of the second."""

_DTYPES = ("float32", "float16", "bfloat16")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_BATCH = re.compile(r"[1-9][0-9]{0,3}")


def check_manifest(manifest: Manifest) -> None:
    """Raises BundleKey, BundlePath, BundleTooLarge or BundleFormat, naming the key, unless all of it fits together."""
    if manifest.format != FORMAT:
        raise BundleFormat("The format is not the one this version writes.", expected=FORMAT, got=manifest.format,
                           where="format", hint=COMPILE_AGAIN)  # fmt: skip
    _check_files(manifest.files)
    _check_stages(manifest)
    networks = _check_networks(manifest)
    built: set[tuple[str, str, str | None]] = set()
    for n, engine in enumerate(manifest.engines):
        _check_engine(engine, networks, manifest.files, f"engines[{n}]")
        key = (engine.network, engine.backend, engine.file)  # builds for several devices are several files
        _require(key not in built, "A network has two engines for one backend.", expected="one, so that it is clear "
                 "which one runs", got=key, where=f"engines[{n}].backend")  # fmt: skip
        built.add(key)
    _check_goldens(manifest, networks)
    _check_postprocessing(manifest)
    _check_provenance(manifest.provenance)


def _require(ok: bool, what: str, *, expected: object, got: object, where: str) -> None:
    if not ok:
        raise BundleKey(what, expected=expected, got=short(got), where=where, hint=COMPILE_AGAIN)


def _limit(got: int | float, largest: int, what: str, where: str) -> None:
    if got > largest:
        raise BundleTooLarge(what, expected=f"at most {largest}", got=got, where=where,
                             hint="do not use this bundle unless you know who made it")  # fmt: skip


def _check_files(files: Mapping[str, FileEntry]) -> None:
    _limit(len(files), MAX_FILES, "The bundle lists more files than any real one.", "files")
    folded: dict[str, str] = {}
    for name, entry in files.items():
        where = f"files[{short(name)}]"
        check_name(name, where)
        _require(entry.size >= 0, "A size is negative.", expected="0 or more", got=entry.size, where=f"{where}.size")
        _limit(entry.size, MAX_FILE_SIZE, "A file of the bundle is declared larger than any real one.", f"{where}.size")
        _require(bool(_SHA256.fullmatch(entry.sha256)), "A SHA-256 is none.", expected="64 lower-case hex digits",
                 got=entry.sha256, where=f"{where}.sha256")  # fmt: skip
        # a folder may not differ from a file or another folder in case alone: on some systems they are one
        for part in (*parents_of(name), name):
            if folded.setdefault(part.lower(), part) != part:
                raise BundlePath("Two names of the bundle differ in upper and lower case alone.", where=where,
                                 got=(folded[part.lower()], part), hint="give one of them another name")  # fmt: skip


def _check_listed(name: str, ending: str, files: Mapping[str, FileEntry], where: str) -> None:
    check_name(name, where)
    _require(name in files, "A file is named that is not listed.", expected="a key of files", got=name, where=where)
    _require(name.endswith(ending), "A file has the wrong ending.", expected=ending, got=name, where=where)


def _check_stages(manifest: Manifest) -> None:
    stages = manifest.stages
    _require(len(stages) in (1, 2), "A bundle has one stage, or two (a cascade).", expected="1 or 2", got=len(stages),
             where="stages")  # fmt: skip
    for n, stage in enumerate(stages):
        _check_stage(stage, f"stages[{n}]")
    if len(stages) == 2:
        first, second = stages[0].spec, stages[1].spec
        _require(first.previous_stage is None, "The first stage of a cascade needs another one.", expected=None,
                 got=first.previous_stage, where="stages[0].spec.previous_stage")  # fmt: skip
        _require(second.previous_stage == first.configuration, "The second stage does not follow the first.",
                 expected=first.configuration, got=second.previous_stage,
                 where="stages[1].spec.previous_stage")  # fmt: skip
        for fact in SHARED_BY_STAGES:
            _require(getattr(first, fact) == getattr(second, fact), f"The stages differ in {fact}.",
                     expected=getattr(first, fact), got=getattr(second, fact),
                     where=f"stages[1].spec.{fact}")  # fmt: skip


def _check_stage(stage: Stage, where: str) -> None:
    spec, axes = stage.spec, stage.mirror_axes
    _require(len(set(axes)) == len(axes) and all(0 <= axis < spec.dimensions for axis in axes),
             "The mirror axes do not fit the patch.", expected=f"distinct axes below {spec.dimensions}", got=axes,
             where=f"{where}.mirror_axes")  # fmt: skip
    _require(0 < spec.step_size <= 1, "The step size is no part of a patch.", expected="above 0, at most 1",
             got=spec.step_size, where=f"{where}.spec.step_size")  # fmt: skip
    _require(spec.sigma_scale > 0, "The Gaussian has no width.", expected="above 0", got=spec.sigma_scale,
             where=f"{where}.spec.sigma_scale")  # fmt: skip
    _require(spec.labels.heads > 0, "The model has no output channel.", expected="at least one", got=spec.labels.values,
             where=f"{where}.spec.labels.values")  # fmt: skip
    _require(bool(stage.networks), "A stage has no network.", expected="at least one", got=stage.networks,
             where=f"{where}.networks")  # fmt: skip
    _limit(math.prod(spec.patch) * max(spec.network_channels, spec.labels.heads), MAX_ELEMENTS,
           "One patch has more elements than a network can have.", f"{where}.spec.patch")  # fmt: skip


def _check_networks(manifest: Manifest) -> dict[str, ModelSpec]:
    """The spec that belongs to each network id."""
    specs: dict[str, ModelSpec] = {}
    files: set[str] = set()
    for s, stage in enumerate(manifest.stages):
        before: dict[str, NetworkRecord] = {}
        for n, network in enumerate(stage.networks):
            where = f"stages[{s}].networks[{n}]"
            _require(bool(network.id) and network.id not in specs, "A network id is empty or used twice.",
                     expected="a name of its own", got=network.id, where=f"{where}.id")  # fmt: skip
            _check_listed(network.file, ".onnx", manifest.files, f"{where}.file")
            _require(network.file not in files, "Two networks share a file.", expected="a file of its own",
                     got=network.file, where=f"{where}.file")  # fmt: skip
            parent = network.parent
            _require(parent is None or (parent in before and before[parent].fold == network.fold),
                     "A network's parent is none.", expected="the id of a network before it in this stage, same fold",
                     got=parent, where=f"{where}.parent")  # fmt: skip
            _check_io(network.io, stage.spec, f"{where}.io")
            specs[network.id] = stage.spec
            before[network.id] = network
            files.add(network.file)
    return specs


def _check_io(io: tuple[TensorSpec, ...], spec: ModelSpec, where: str) -> None:
    _require(len(io) == 2 and io[0].name != io[-1].name, "A network has one input and one output.", got=io, where=where,
             expected="the input, then the output, with different names")  # fmt: skip
    for n, (tensor, channels) in enumerate(zip(io, (spec.network_channels, spec.labels.heads), strict=True)):
        expected = (channels, *spec.patch)
        batch = tensor.shape[:1]
        named = all(isinstance(size, str) or 1 <= size <= MAX_BATCH for size in batch)
        _require(bool(batch) and named and tensor.shape[1:] == expected, "A tensor does not fit the model.",
                 expected=("batch", *expected), got=tensor.shape, where=f"{where}[{n}].shape")  # fmt: skip
        _require(tensor.dtype in _DTYPES, "A tensor has a type that no runner takes.", expected=_one_of(_DTYPES),
                 got=tensor.dtype, where=f"{where}[{n}].dtype")  # fmt: skip


def _check_engine(
    engine: BuildRecord, networks: Mapping[str, ModelSpec], files: Mapping[str, FileEntry], where: str
) -> None:
    _require(engine.network in networks, "An engine is of a network that is not there.", expected=_one_of(networks),
             got=engine.network, where=f"{where}.network")  # fmt: skip
    if engine.file is not None:
        _check_listed(engine.file, "", files, f"{where}.file")
    spec, profile = networks[engine.network], engine.profile
    sample = (spec.network_channels, *spec.patch)
    for name in ("min", "opt", "max"):
        shape: tuple[int, ...] = getattr(profile, name)
        _require(shape[1:] == sample and shape[0] >= 1, "A profile does not fit the model.",
                 expected=("batch", *sample), got=shape, where=f"{where}.profile.{name}")  # fmt: skip
        _limit(shape[0], MAX_BATCH, "A batch is larger than any real one.", f"{where}.profile.{name}")
    batches = (profile.min[0], profile.opt[0], profile.max[0])
    _require(sorted(batches) == list(batches), "A profile is not in order.", expected="min <= opt <= max", got=batches,
             where=f"{where}.profile")  # fmt: skip
    memory = engine.memory
    _require(all(_BATCH.fullmatch(key) for key in memory.device_per_batch),
             "Device memory is given per batch size.", expected="decimal numbers as keys",
             got=list(memory.device_per_batch), where=f"{where}.memory.device_per_batch")  # fmt: skip
    _require(all(size >= 0 for size in (memory.host or 0, *memory.device_per_batch.values())),
             "An amount of memory is negative.", expected="0 bytes or more", got=memory,
             where=f"{where}.memory")  # fmt: skip


def _check_goldens(manifest: Manifest, networks: Mapping[str, ModelSpec]) -> None:
    for n, golden in enumerate(manifest.goldens):
        where = f"goldens[{n}]"
        if golden.kind == "patch":
            _require(golden.network in networks, "A golden patch is of a network that is not there.",
                     expected=_one_of(networks), got=golden.network, where=f"{where}.network")  # fmt: skip
        else:
            _require(golden.network is None, "A golden case belongs to the whole bundle.", expected=None,
                     got=golden.network, where=f"{where}.network")  # fmt: skip
        spacing = golden.spacing
        _require(spacing is None if golden.kind == "patch" else spacing is not None and min(spacing) > 0,
                 "A golden's spacing is wrong.", expected="three positive numbers for a case, none for a patch",
                 got=spacing, where=f"{where}.spacing")  # fmt: skip
        _check_listed(golden.input, ".npy", manifest.files, f"{where}.input")
        _check_listed(golden.output, ".npy", manifest.files, f"{where}.output")


def _check_postprocessing(manifest: Manifest) -> None:
    """The labels that a step keeps or writes must be labels of the model."""
    labels = manifest.stages[-1].spec.labels
    known = {*labels.values, *labels.foreground}
    for n, step in enumerate(manifest.postprocessing):
        where = f"postprocessing[{n}]"
        _require(bool(step.labels) and len(set(step.labels)) == len(step.labels) and known.issuperset(step.labels),
                 "The labels of a post-processing step are not the model's.", got=step.labels, where=f"{where}.labels",
                 expected=f"distinct labels out of {short(sorted(known))}")  # fmt: skip
        _require(step.background not in step.labels and step.background in known | {0},
                 "The background of a post-processing step is wrong.", got=step.background, where=f"{where}.background",
                 expected="0, or a label that is not among the step's own")  # fmt: skip


def _check_provenance(provenance: Provenance) -> None:
    _require(bool(_UTC.fullmatch(provenance.created)), "The time of making is not UTC in ISO 8601.",
             expected="like 2026-01-31T12:00:00Z", got=provenance.created, where="provenance.created")  # fmt: skip
    for name, digest in provenance.sources.items():
        _require(bool(_SHA256.fullmatch(digest)), "A SHA-256 is none.", expected="64 lower-case hex digits", got=digest,
                 where=f"provenance.sources[{short(name)}]")  # fmt: skip


def _one_of(names: Iterable[str]) -> str:
    return "one of " + short(list(names))
