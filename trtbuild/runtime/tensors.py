"""Any graph on the CPU, all of its outputs: what calibration looks at networks with, in OpenVINO and float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.openvino import openvino_module
from trtbuild.runtime.runner import Batch, engine_errors

Outputs = Mapping[str, NDArray[Any]]


@contextmanager
def open_tensors(model: bytes, shape: tuple[int, ...], *, threads: int) -> Iterator[Callable[[Batch], Outputs]]:
    """Opens a graph; the function that it gives runs one batch and returns every output under its name.

    Computed in float32 in OpenVINO's accuracy mode, whatever the graph is for. The arrays are the backend's own and
    hold until the next call.

    Args:
        model: an ONNX graph with one float32 input.
        shape: of that input, (1, C, *patch).
        threads: CPU threads.

    Raises:
        EngineError: OpenVINO refuses the graph or fails.
        OutOfMemory: an allocation failed.
    """
    openvino = openvino_module()
    with engine_errors(
        "OpenVINO cannot open the graph.", "calibration", RuntimeError, openvino.frontend.GeneralFailure
    ):
        core = openvino.Core()
        network = core.read_model(model, b"")
        network.reshape(list(shape))
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "EXECUTION_MODE_HINT": "ACCURACY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        request = core.compile_model(network, "CPU", options).create_infer_request()
        names = [port.get_any_name() for port in network.outputs]
        del network, model  # each holds a copy of the weights

    def run(batch: Batch) -> Outputs:
        with engine_errors("OpenVINO failed.", "calibration", RuntimeError):
            request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(batch), shared_memory=False))
            request.infer()
            return {name: request.get_output_tensor(number).data for number, name in enumerate(names)}

    yield run
