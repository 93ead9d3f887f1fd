"""How TensorRT builds an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trtbuild.config.checks import check_flag, check_known, check_whole
from trtbuild.errors import TrtbuildError

MOST_BATCH = 4096
"""As many as a bundle's record may hold."""
MOST_WORKSPACE = (2**63 - 1) >> 20
"""MiB: TensorRT takes bytes as a signed number of 64 bits."""
Compatibility = Literal["none", "ampere+", "sameComputeCapability"]


@dataclass(frozen=True, kw_only=True)
class TensorRTConfig:
    """How TensorRT builds an engine; the names follow trtexec's options.

    The patch is fixed and the batch free from `min_batch` to `max_batch` (at most 4096), with the fastest kernels for
    `opt_batch`.
    `workspace` is in MiB (None: all that the device has). `optimization_level` is 0 to 5 (3 is TensorRT's own).
    `tf32` lets float32 convolutions round their inputs to TF32, so it is off: FP32 means FP32. `compute_capabilities`
    ("86", …; () for all that the flavour knows) are TensorRT-RTX's; `hardware_compatibility`, `version_compatible` and
    `timing_cache` (kept in the user's cache folder) are TensorRT's. `strip_plan` and `refit` need a GPU at build time.
    """

    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 4
    workspace: int | None = None
    optimization_level: int = 3
    tf32: bool = False
    sparsity: bool = False
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: Compatibility = "none"
    version_compatible: bool = False
    weight_streaming: bool = False
    strip_plan: bool = False
    refit: bool = False
    timing_cache: bool = True
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("min_batch", "opt_batch", "max_batch"):
            _check_range(getattr(self, name), 1, MOST_BATCH, f"--{name.replace('_', '-')}")
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise TrtbuildError(
                "The batches of the profile are out of order.",
                expected="--min-batch <= --opt-batch <= --max-batch",
                got=f"{self.min_batch}, {self.opt_batch}, {self.max_batch}",
            )
        if self.workspace is not None:
            _check_range(self.workspace, 1, MOST_WORKSPACE, "--workspace")
        _check_range(self.optimization_level, 0, 5, "--builderOptimizationLevel")
        for name in ("tf32", "sparsity", "version_compatible", "weight_streaming", "strip_plan", "refit",
                     "timing_cache", "verbose"):  # fmt: skip
            check_flag(getattr(self, name), name)
        check_known("hardware_compatibility", self.hardware_compatibility, get_args(Compatibility))
        capabilities = self.compute_capabilities
        if (
            not isinstance(capabilities, tuple)
            or not all(isinstance(name, str) and name for name in capabilities)  # "," is not "all"
            or len(set(capabilities)) != len(capabilities)
        ):
            raise TrtbuildError(
                "The list of compute capabilities is wrong.",
                expected='distinct ones, such as ("86", "89")',
                got=repr(capabilities),
                where="--compute-capability",
                hint="--compute-capability 86,89, or leave it out for all",
            )


def _check_range(value: int, least: int, most: int, where: str) -> None:
    check_whole(value, least, where)
    if value > most:
        raise TrtbuildError("A number is out of range.", expected=f"{least} to {most}", got=value, where=where)
