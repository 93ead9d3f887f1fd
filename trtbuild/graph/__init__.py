"""ONNX -> ONNX: a network is read, checked, cleaned and written.

Does: small passes with contracts (`passes`), the default order of them (`clean`), a before/after table.
Takes: an ONNX model in one file, with all weights in it and without control flow. Gives: another one with the same
meaning; what it was given is never changed. May touch: the ONNX files that it is asked to read and write.
Imports onnx and onnx-graphsurgeon only when one of its functions runs; knows neither torch nor a backend.
"""

from trtbuild.graph.clean import clean, clean_passes
from trtbuild.graph.files import check_model, load_onnx, model_from_bytes, save_onnx
from trtbuild.graph.passes import CleanResult, Pass, PassReport, run_passes
from trtbuild.graph.table import TableRow, io_from_model, op_counts, opset_from_model, table_from_clean

__all__ = [
    "CleanResult",
    "Pass",
    "PassReport",
    "TableRow",
    "check_model",
    "clean",
    "clean_passes",
    "io_from_model",
    "load_onnx",
    "model_from_bytes",
    "op_counts",
    "opset_from_model",
    "run_passes",
    "save_onnx",
    "table_from_clean",
]
