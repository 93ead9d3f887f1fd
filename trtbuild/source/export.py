"""torch module -> ONNX bytes, proved equal to torch in ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import GraphError, ModelError
from trtbuild.source.exact_norm import with_exact_instance_norm
from trtbuild.source.extras import require
from trtbuild.source.patch import realistic_patch
from trtbuild.spec import ModelSpec

if TYPE_CHECKING:
    import torch

OPSET = 20
INPUT, OUTPUT = "image", "logits"
# Of the largest logit. The same float32 network in another order of operations lies at 5e-7 to 2e-6 (`exact_norm.py`
# says under which condition), a wrong operator at 1e-2 and more.
TOLERANCE = 2e-4


@dataclass(frozen=True, kw_only=True)
class ExportedNetwork:
    """One fold as ONNX: input "image" (batch, C, *patch), output "logits" (batch, heads, *patch), both float32.

    `golden_input` (1, C, *patch) and `golden_logits` (1, heads, *patch) are float32 and come from torch. `max_error` is
    the largest difference of ONNX Runtime to torch, over the largest logit, with InstanceNormalization computed by its
    definition (`exact_norm.py`): the error of the export, not of a backend's kernels.
    """

    fold: str
    model: bytes
    golden_input: NDArray[np.float32]
    golden_logits: NDArray[np.float32]
    max_error: float


def exported_network(network: torch.nn.Module, spec: ModelSpec, fold: str) -> ExportedNetwork:
    """Exports a network and checks the result with batches of one and two.

    Raises:
        ModelError: torch itself cannot run the network on its patch, its logits are not finite or of another shape, or
            it cannot be expressed in ONNX.
        GraphError: ONNX Runtime refuses the ONNX, or differs from torch by more than `TOLERANCE`.
    """
    require("onnx")
    require("onnxruntime")
    patches = np.stack([realistic_patch(spec, seed) for seed in (0, 1)])
    logits = np.concatenate([_torch_logits(network, patch[None], spec, fold) for patch in patches])
    model = onnx_from_network(network, patches[:1])
    judged = with_exact_instance_norm(model, spec.dimensions)
    errors = [_error(_onnx_logits(judged, patches[:size], fold), logits[:size]) for size in (1, 2)]
    if not max(errors) <= TOLERANCE:
        raise GraphError("The exported network differs from torch.", expected=f"at most {TOLERANCE} of the largest",
                         got=f"{errors[0]:.3g} (batch 1), {errors[1]:.3g} (batch 2)", where=f"fold {fold}",
                         hint="this network cannot be used; please report it")  # fmt: skip
    return ExportedNetwork(fold=fold, model=model, golden_input=patches[:1].copy(), golden_logits=logits[:1].copy(),
                           max_error=max(errors))  # fmt: skip


def onnx_from_network(network: torch.nn.Module, patch: NDArray[np.float32]) -> bytes:
    """A serialised ONNX model of opset `OPSET` with a free batch axis, weights inside.

    Args:
        network: in evaluation mode.
        patch: (1, C, *patch), only to trace with.

    torch's TorchScript exporter is used: on these networks it gives the same nodes as the one built on torch.export,
    in a tenth of the time, and does not write stack traces with local paths into the file. What tracing can get wrong,
    a batch size or a branch baked in, the check with two batches finds; its warnings are therefore dropped.
    """
    torch = require("torch")
    buffer = io.BytesIO()
    free = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(network, (torch.from_numpy(patch),), buffer, dynamo=False, opset_version=OPSET,
                              input_names=[INPUT], output_names=[OUTPUT], dynamic_axes=free)  # fmt: skip
    except (RuntimeError, TypeError, ValueError) as error:  # torch.onnx's own errors are RuntimeErrors
        raise ModelError("The network cannot be exported to ONNX.", got=f"{type(error).__name__}: {error}",
                         where=f"torch.onnx.export, opset {OPSET}") from error  # fmt: skip
    return buffer.getvalue()


def _torch_logits(
    network: torch.nn.Module, patch: NDArray[np.float32], spec: ModelSpec, fold: str
) -> NDArray[np.float32]:
    torch = require("torch")
    try:
        with torch.inference_mode():
            result = network(torch.from_numpy(patch))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ModelError("The network does not accept its own patch.", expected=f"patch {spec.patch}",
                         got=f"{type(error).__name__}: {error}", where=f"fold {fold}") from error  # fmt: skip
    expected = (1, spec.labels.heads, *spec.patch)
    if not isinstance(result, torch.Tensor) or tuple(result.shape) != expected:
        raise ModelError("The network's output is not one array of logits.", expected=expected, where=f"fold {fold}",
                         got=tuple(getattr(result, "shape", ())) or type(result).__name__)  # fmt: skip
    logits: NDArray[np.float32] = result.float().numpy()
    if not np.isfinite(logits).all():
        raise ModelError("The network returns NaN or infinity on a realistic patch.", where=f"fold {fold}",
                         hint="the training broke down; use another checkpoint (-chk)")  # fmt: skip
    return logits


def _onnx_logits(model: bytes, patches: NDArray[np.float32], fold: str) -> NDArray[np.float32]:
    runtime, torch = require("onnxruntime"), require("torch")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions and need not be printed, too
    options.intra_op_num_threads = torch.get_num_threads()  # whatever limit torch works under holds here too
    try:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        logits: NDArray[np.float32] = session.run([OUTPUT], {INPUT: patches})[0]
    except MemoryError:
        raise
    except Exception as error:  # the classes of ONNX Runtime's errors have no base of their own
        raise GraphError("ONNX Runtime cannot run the exported network.", got=error,
                         where=f"fold {fold}, batch {len(patches)}") from error  # fmt: skip
    return logits


def _error(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Largest difference over the largest value of the reference; infinite where the shapes differ."""
    if logits.shape != reference.shape:
        return float("inf")
    largest = float(np.abs(reference).max())
    difference = float(np.abs(logits - reference).max())
    return 0.0 if difference == 0 else difference / largest if largest > 0 else float("inf")
