"""What bundle.json says, as frozen values. FORMAT.md beside this file describes every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from trtbuild.bundle.checks import FORMAT, check_manifest
from trtbuild.spec import STRICT, BuildRecord, KeepLargestComponent, ModelSpec, NetworkRecord


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One model of the bundle; two stages are a cascade. `mirror_axes` count the patch's own axes (0 is its first)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    spec: ModelSpec
    mirror_axes: tuple[int, ...]
    networks: tuple[NetworkRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """An input and the output that belongs to it, both `.npy` files of the bundle.

    "patch": a batch (B, C, *patch) and the logits (B, heads, *patch) that the network with id `network` gives for it.
    "case": a small whole image (C, Z, Y, X) as read from a file, with its `spacing` (mm, in z, y, x), and its
    segmentation (Z, Y, X) without mirroring, after all stages and the post-processing; `network` is None.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: Literal["patch", "case"]
    network: str | None
    input: str
    output: str
    spacing: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 (64 lower-case hex digits) of a file."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the bundle comes from.

    `trtbuild` is the version that wrote it, `created` UTC as 2026-01-31T12:00:00Z, `model` the name of the source
    folder or zip, `sources` the SHA-256 of every source file by its path in that folder (those of a cascade's first
    stage below `previous_stage/`), `notes` what was chosen or assumed for the user, `versions` those of the packages.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    trtbuild: str
    created: str
    model: str
    plans: str
    trainer: str
    checkpoint: str
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All of bundle.json but its list of files, which the writer makes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    format: int = FORMAT
    stages: tuple[Stage, ...]
    engines: tuple[BuildRecord, ...]
    calibrations: tuple[Mapping[str, Any], ...]
    gates: tuple[Mapping[str, Any], ...]
    goldens: tuple[Golden, ...]
    postprocessing: tuple[KeepLargestComponent, ...]
    provenance: Provenance
    extensions: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest(Contents):
    """bundle.json whole. One that contradicts itself cannot be built: BundleKey, BundlePath or BundleTooLarge."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        check_manifest(self)

    @property
    def contents(self) -> Contents:
        """This manifest without its files: what `write_bundle` takes to write it again, changed."""
        return Contents(**{field.name: getattr(self, field.name) for field in fields(Contents)})
