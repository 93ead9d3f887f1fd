"""The layers of a built engine: read from what TensorRT says of it, and as a file of a bundle."""

from trtbuild.engine.tensorrt.inspector import table_from_inspector
from trtbuild.engine.tensorrt.layers_file import (
    LayersFile,
    facts_from_table,
    layers_file,
    read_layers_file,
    table_from_facts,
)
from trtbuild.engine.tensorrt.log_table import table_from_log

__all__ = [
    "LayersFile",
    "facts_from_table",
    "layers_file",
    "read_layers_file",
    "table_from_facts",
    "table_from_inspector",
    "table_from_log",
]
