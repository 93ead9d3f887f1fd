"""The packages of the [export] extra, imported when needed."""

from __future__ import annotations

import importlib
import os
from typing import Any

from trtbuild.errors import MissingExtra

PACKAGES = {
    "torch": "PyTorch",
    "dynamic_network_architectures": "dynamic-network-architectures",
    "onnx": "onnx",
    "onnxruntime": "ONNX Runtime",
}


def require(package: str) -> Any:
    """The imported package, one of `PACKAGES`.

    Raises:
        MissingExtra: it is not installed. An import error inside an installed package is passed on as it is.
    """
    if package == "onnxruntime":
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # its import would write a session's number to a file
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtra(PACKAGES[package], "export", "read checkpoints and export networks") from error
