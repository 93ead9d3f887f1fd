"""The passes that every network goes through, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtbuild.graph.drop_dead import DROP_DEAD
from trtbuild.graph.files import check_model
from trtbuild.graph.fold_constants import FOLD_CONSTANTS
from trtbuild.graph.fold_duplicate_initializers import FOLD_DUPLICATE_INITIALIZERS
from trtbuild.graph.fold_identities import FOLD_IDENTITIES
from trtbuild.graph.infer_shapes import INFER_SHAPES
from trtbuild.graph.passes import CleanResult, Pass, run_passes
from trtbuild.graph.rewrite_conv_transpose import REWRITE_CONV_TRANSPOSE
from trtbuild.graph.stable_names import STABLE_NAMES

if TYPE_CHECKING:
    import onnx


def clean_passes(*, rewrite_conv_transpose: bool) -> tuple[Pass, ...]:
    """The passes of `clean`. Shapes come before what asks for them, and again last, for what is new by then."""
    rewrite = (REWRITE_CONV_TRANSPOSE,) if rewrite_conv_transpose else ()
    return (
        DROP_DEAD,
        FOLD_IDENTITIES,
        INFER_SHAPES,
        FOLD_CONSTANTS,
        *rewrite,
        FOLD_DUPLICATE_INITIALIZERS,
        STABLE_NAMES,
        INFER_SHAPES,
    )


def clean(model: onnx.ModelProto, *, rewrite_conv_transpose: bool) -> CleanResult:
    """The same network with a smaller graph, known shapes and names that do not depend on the exporter.

    Args:
        model: one graph of plain nodes with its weights inside. It is not changed, but the result may share it.
        rewrite_conv_transpose: whether ConvTranspose with kernel = stride becomes Conv and depth-to-space; for
            TensorRT. OpenVINO and ONNX Runtime are slower with it.

    Raises:
        GraphError: the model is malformed or has parts that cannot be cleaned, or a pass broke its contract.
        MissingExtra: onnx or onnx-graphsurgeon is not installed.
    """
    check_model(model)
    result = run_passes(model, clean_passes(rewrite_conv_transpose=rewrite_conv_transpose))
    check_model(result.model, where="the cleaned model")
    return result
