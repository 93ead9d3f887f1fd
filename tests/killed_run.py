"""Run as a script: `trtbuild` with its stages noted in a file, killed (SIGKILL) in one of them if wanted.

    python killed_run.py LOG STAGE NUMBER DELAY WHO predict BUNDLE -i IMAGES -o OUT …

At the NUMBER-th time (from 0) that STAGE begins, and DELAY seconds later, the process kills WHO: "alone" is itself,
with "both" the process that reads images, too. STAGE "-" lives. LOG gets a line "SECONDS STAGE enter|leave" per event,
and "SECONDS worker PID" once. What is left is for test_killed_run.py to judge.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.cli import run
from trtbuild.steps.folder_run import child, flow
from trtbuild.steps.folder_run.messages import Stage
from trtbuild.steps.prediction.predictor import Predictor

STAGES = ("reading", "network", "back", "writing", "renaming")
"""The last is the moment of a rename, which is a part of writing."""


@dataclass
class Diary:
    """Notes what begins and ends, and kills in time."""

    log: int
    stage: str
    number: int
    delay: float
    everybody: bool
    worker: int | None = None

    def note(self, text: str) -> None:
        os.write(self.log, f"{time.monotonic()} {text}\n".encode())

    def enter(self, stage: str) -> None:
        self.note(f"{stage} enter")
        if stage != self.stage:
            return
        self.number -= 1
        if self.number == -1 and self.delay:
            threading.Timer(self.delay, self.kill).start()
        elif self.number == -1:
            self.kill()

    def leave(self, stage: str) -> None:
        self.note(f"{stage} leave")

    def kill(self) -> None:
        if self.everybody and self.worker is not None:
            os.kill(self.worker, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def within(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            self.enter(stage)
            result = function(*arguments, **options)
            self.leave(stage)
            return result

        return noted


def watch(diary: Diary) -> None:
    """Puts the diary between the run and its stages."""
    receive, predict = child.receive, Predictor.predict_prepared

    def received(pipe: Any) -> object:
        message = receive(pipe)
        if isinstance(message, Stage) and message.name in ("reading", "preparing"):
            (diary.enter if message.name == "reading" else diary.leave)("reading")
        return message

    def predicted(self: Predictor, prepare: Any, settings: Any, progress: Any) -> Any:
        seen: set[str] = set()

        def noted(stage: str, done: int, total: int) -> bool | None:
            if stage not in seen:
                seen.add(stage)
                if stage == "back":
                    diary.leave("network")
                diary.enter(stage)
            return None if progress is None else progress(stage, done, total)

        result = predict(self, prepare, settings, noted)
        diary.leave("back")
        return result

    class WatchedChild(child.Child):
        def greet(self) -> None:
            super().greet()
            diary.worker = self.process.pid
            diary.note(f"worker {diary.worker}")

    child.receive = received  # type: ignore[assignment]
    Predictor.predict_prepared = predicted  # type: ignore[method-assign]
    sys.modules["trtbuild.steps.folder_run.worker"].Child = WatchedChild  # type: ignore[attr-defined]
    flow.write_case = diary.within("writing", flow.write_case)
    replace = diary.within("renaming", os.replace)
    flow_start = flow.run_cases

    def started(*arguments: Any) -> None:
        os.replace = replace  # type: ignore[assignment]  # not before the first case: the record is written by then
        flow_start(*arguments)

    sys.modules["trtbuild.steps.folder_run.cases"].run_cases = started  # type: ignore[attr-defined]


def main(words: list[str]) -> int:
    log = os.open(Path(words[0]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    watch(Diary(log=log, stage=words[1], number=int(words[2]), delay=float(words[3]), everybody=words[4] == "both"))
    return run(words[5:])


if __name__ == "__main__":
    import trtbuild.steps.folder_run.cases  # noqa: F401  # what `watch` reaches into

    sys.exit(main(sys.argv[1:]))
