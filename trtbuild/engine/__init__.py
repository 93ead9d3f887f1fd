"""Turns a typed ONNX network into an engine: on a CPU the ONNX itself with the settings that run it best.

Does: opens the network in a backend, proves that it runs, measures settings and memory, writes them down.
Takes: an ONNX file and its NetworkRecord. Gives: a BuildRecord (and, for a GPU, the plan).
May touch: the engine file it writes. It knows neither torch nor windows; it runs an engine only through a Runner.
"""

from trtbuild.engine.build import engine_from_onnx, plain_record
from trtbuild.engine.tune import Trial, Tuning, fastest

__all__ = ["Trial", "Tuning", "engine_from_onnx", "fastest", "plain_record"]
