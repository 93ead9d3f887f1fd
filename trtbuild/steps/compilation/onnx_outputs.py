"""The files that an ONNX file's engine comes with: where they may go, and that all of them change or none."""

from __future__ import annotations

import os
from contextlib import ExitStack

from trtbuild.atomic import whole_file
from trtbuild.engine.tensorrt.script import check_script
from trtbuild.errors import GraphError, OutputError
from trtbuild.steps.compilation.onnx_config import OnnxFileConfig


def check_paths(config: OnnxFileConfig) -> None:
    """Before any work: whether the model is there and everything may be written.

    Raises:
        GraphError: there is no such model.
        OutputError: an output exists, is no file, or has no folder; the script would replace something else.
    """
    if not config.model.is_file():
        raise GraphError("There is no such ONNX file.", got="a folder" if config.model.is_dir() else "nothing",
                         where=config.model, hint="check the path")  # fmt: skip
    if not config.output.parent.is_dir():
        raise OutputError("There is no such folder.", where=config.output.parent, hint="make it, or choose another one")
    for path in config.outputs:
        if os.path.lexists(path) and not (path.is_file() or path.is_symlink()):
            raise OutputError("The output would replace what is no file.", expected="a file, or nothing", where=path,
                              hint="choose another name")  # fmt: skip
        if os.path.lexists(path) and not config.overwrite:
            raise OutputError("The output exists.", where=path, hint="choose another name, or add --overwrite")
    if config.emit_script is not None:
        inputs = [config.model, *([config.calibration] if config.calibration is not None else [])]
        check_script(config.emit_script, taken=(*inputs, *config.outputs), overwrite=config.overwrite)


def write_outputs(config: OnnxFileConfig, *, engine: bytes, onnx: bytes, facts: bytes, script: bytes | None) -> None:
    """Writes all of them beside their names first, and renames them then, the engine last: an engine under its name
    has its own files beside it.

    Raises:
        OutputError: one cannot be written; nothing has changed then, unless a rename failed.
    """
    contents = {config.output: engine, config.onnx: onnx, config.facts: facts}
    if config.emit_script is not None and script is not None:
        contents[config.emit_script] = script
    with ExitStack() as stack:  # which leaves in reverse order
        for path, content in contents.items():
            stack.enter_context(whole_file(path)).write_bytes(content)
