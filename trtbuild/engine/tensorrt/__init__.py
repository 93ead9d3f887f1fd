"""TensorRT engines: TensorRT 10, TensorRT 11 and TensorRT-RTX by one path.

Does: parses typed ONNX into a strongly typed network, builds the plan, and says what was built or why it was not.
Takes: ONNX bytes whose types are the precision, a TensorRTConfig, the shapes that the batch may take, and the flavour
of TensorRT from `trtbuild.nvinfer`. Gives: a Plan, its layer table and warnings among it; what the parser refuses.
May touch: the GPU of the machine where the flavour builds for one, Ctrl-C's handler while a build runs, stderr with
`verbose`. No global state: two builds know nothing of each other. It reads and writes no ONNX and runs no engine.
"""

from trtbuild.engine.tensorrt.build import plan_from_onnx
from trtbuild.engine.tensorrt.parse import unsupported
from trtbuild.engine.tensorrt.progress import Tell
from trtbuild.engine.tensorrt.shapes import shapes_from_io
from trtbuild.engine.tensorrt.values import EngineLayer, EngineTable, LayerTensor, Plan, Shapes

__all__ = [
    "EngineLayer",
    "EngineTable",
    "LayerTensor",
    "Plan",
    "Shapes",
    "Tell",
    "plan_from_onnx",
    "shapes_from_io",
    "unsupported",
]
