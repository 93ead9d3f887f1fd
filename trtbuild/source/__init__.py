"""source: a trained nnU-Net v2 folder becomes a ModelSpec, one ONNX network per fold, and golden input/output pairs.

Takes a folder of plans.json, dataset.json and checkpoints. Gives values; writes nothing and reads that folder only.
The only room that knows torch and dynamic_network_architectures, which it imports when a checkpoint is read. It runs no
code of the model's maker without the user's word.
"""

from trtbuild.source.export import INPUT, OPSET, OUTPUT, ExportedNetwork
from trtbuild.source.model import ExportedModel, ExportedNetworks, SourceConfig, export_model
from trtbuild.source.names import ModelName
from trtbuild.source.plans import spec_from_plans
from trtbuild.source.zipped import is_zip

__all__ = [
    "INPUT",
    "OPSET",
    "OUTPUT",
    "ExportedModel",
    "ExportedNetwork",
    "ExportedNetworks",
    "ModelName",
    "SourceConfig",
    "export_model",
    "is_zip",
    "spec_from_plans",
]
