"""The passes that every network goes through, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtbuild.graph.drop_dead import DROP_DEAD
from trtbuild.graph.files import check_model
from trtbuild.graph.fold_constants import FOLD_CONSTANTS
from trtbuild.graph.fold_duplicate_initializers import FOLD_DUPLICATE_INITIALIZERS
from trtbuild.graph.fold_identities import FOLD_IDENTITIES
from trtbuild.graph.infer_shapes import INFER_SHAPES
from trtbuild.graph.join_instance_norm import JOIN_INSTANCE_NORM
from trtbuild.graph.passes import CleanResult, Pass, run_passes
from trtbuild.graph.rewrite_conv_transpose import REWRITE_CONV_TRANSPOSE
from trtbuild.graph.split_instance_norm import SPLIT_INSTANCE_NORM
from trtbuild.graph.stable_names import STABLE_NAMES

if TYPE_CHECKING:
    import onnx


def clean_passes(*, rewrite_conv_transpose: bool, split_instance_norm: bool) -> tuple[Pass, ...]:
    """The passes of `clean`. Shapes come before what asks for them, and again last, for what is new by then.

    Norms are joined in any case and split last: names then come from the same graph whether it was split before or not.
    """
    rewrite = (REWRITE_CONV_TRANSPOSE,) if rewrite_conv_transpose else ()
    split = (SPLIT_INSTANCE_NORM, INFER_SHAPES) if split_instance_norm else ()
    return (
        DROP_DEAD,
        FOLD_IDENTITIES,
        INFER_SHAPES,
        FOLD_CONSTANTS,
        JOIN_INSTANCE_NORM,
        *rewrite,
        FOLD_DUPLICATE_INITIALIZERS,
        STABLE_NAMES,
        INFER_SHAPES,
        *split,
    )


def clean(model: onnx.ModelProto, *, rewrite_conv_transpose: bool, split_instance_norm: bool) -> CleanResult:
    """The same network with a smaller graph, known shapes and names that do not depend on the exporter.

    The result is a normal form: it depends neither on the exporter nor on whether norms were split before, and cleaning
    it again gives the same bytes (with `split_instance_norm`, by joining and splitting again).

    Args:
        model: one graph of plain nodes with its weights inside. It is not changed, but the result may share it.
        rewrite_conv_transpose: whether ConvTranspose with kernel = stride becomes Conv and depth-to-space; for
            TensorRT. OpenVINO and ONNX Runtime are slower with it.
        split_instance_norm: whether float32 InstanceNormalization is written out with means of means; for float32 in
            OpenVINO and ONNX Runtime, which sum too coarsely. If not, what was written out becomes the operator again.

    Raises:
        GraphError: the model is malformed or has parts that cannot be cleaned, or a pass broke its contract.
        MissingExtra: onnx or onnx-graphsurgeon is not installed.
    """
    check_model(model)
    passes = clean_passes(rewrite_conv_transpose=rewrite_conv_transpose, split_instance_norm=split_instance_norm)
    result = run_passes(model, passes)
    check_model(result.model, where="the cleaned model")
    return result
