"""Run as a script: writes bundles in forked children and kills each (SIGKILL) at another line of the writer's code.

    python bundle_killed.py FOLDER fresh|exchange|renames

Child n works in FOLDER/n and dies at the n-th line that it runs of swap.py, writer.py or shutil.py (rmtree). The last
one lives. What they leave is for test_bundle_killed.py to judge.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from bundle_samples import CONTENTS, FILES, STAGE, network

from trtbuild.bundle import swap, write_bundle, writer

FEW = replace(CONTENTS, stages=(replace(STAGE, networks=(network("0"),)),), engines=(), goldens=())
FEW_FILES = {name: FILES[name] for name in ("networks/fold_0_fp32.onnx", "plans.json")}
TRACED = (swap.__file__, writer.__file__, shutil.__file__)


def kill_at_line(last: int) -> None:
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def child(folder: Path, line: int, way: str) -> None:
    os.fsync = lambda descriptor: None  # the machine stays up: nothing has to reach the disk
    if way == "renames":
        swap.exchange = lambda first, second: False  # type: ignore[assignment]
    kill_at_line(line)
    contents = replace(FEW, gates=({"new": True},))
    write_bundle(folder / "sample.trtb", contents, FEW_FILES, overwrite=way != "fresh")


def main(root: Path, way: str) -> None:
    write_bundle(root / "old.trtb", FEW, FEW_FILES, overwrite=False)
    for line in range(1, 5000):
        folder = root / str(line)
        folder.mkdir()
        if way != "fresh":
            shutil.copytree(root / "old.trtb", folder / "sample.trtb")
        pid = os.fork()
        if pid == 0:
            child(folder, line, way)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            return
        if status != -signal.SIGKILL:
            raise SystemExit(f"child {line} ended with {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
