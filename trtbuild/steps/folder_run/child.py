"""The process that reads and prepares cases, as the run sees it: start it, ask it, and say what it died of."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import trtbuild
from trtbuild.errors import TrtbuildError, WorkerDied
from trtbuild.machine import available_memory
from trtbuild.steps.folder_run.messages import HELLO, LINE, Done, Failed, Message, Stage, receive, send

if sys.platform == "linux":
    import fcntl

CODE = "import sys; sys.path[:] = sys.argv[1:]; from trtbuild.steps.folder_run.worker_main import main; main()"
"""What the process runs: with the run's own search path, so that it finds what a user's script has made findable.
Neither `-m`, which puts the working folder before the standard library, nor multiprocessing, whose spawn runs the
user's script again and whose fork copies the state of threads."""
STDERR_BYTES, STDERR_LINES = 4096, 5
CRASHES = tuple(signal.Signals[name] for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"))
PIPE_BYTES = 1 << 20
"""The largest pipe that Linux grants everybody (fs.pipe-max-size): 1.5 GB/s instead of the 0.7 of 64 KiB."""


class Child:
    """A started process. It dies with the thread that started it (Linux), which therefore must be the one that asks."""

    def __init__(self, command: Sequence[str]) -> None:
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C in the terminal is for the run alone
            )
        except OSError as error:
            raise WorkerDied("The process that reads images cannot be started.", got=error, where=command[0]) from error
        _widen(self.process.stdout)
        self.stage: Stage | None = None
        self._in, self._out, errors = (
            cast(io.FileIO, pipe) for pipe in (self.process.stdin, self.process.stdout, self.process.stderr)
        )
        self._said = b""
        self._listener = threading.Thread(target=self._listen, args=(errors,), name="trtbuild-stderr", daemon=True)
        self._listener.start()

    def greet(self) -> None:
        """Waits until it serves; EOFError where it ends before."""
        while (line := self._out.readline(LINE)) != HELLO:
            if not line:
                raise EOFError("the process ended before it served")

    def ask(self, message: Message) -> Done | Failed:
        """Its answer. EOFError or BrokenPipeError where it ends before; then `stage` says how far it was."""
        self.stage = None
        self._said = b""
        send(self._in, message)
        while True:
            reply = receive(self._out)
            if isinstance(reply, Stage):
                self.stage = reply
            elif isinstance(reply, (Done, Failed)):
                return reply
            else:
                raise TypeError(f"{reply!r} is no reply")

    def kill(self) -> None:
        """Ends it now. It writes no files, so that nothing is left half-done."""
        self.process.kill()

    def exit_code(self) -> int:
        """How it ended, negative for a signal; waits until it has."""
        code = self.process.wait()
        self._listener.join(1)  # a process that it started may keep the other end of its stderr
        for pipe in (self._in, self._out):
            pipe.close()
        return code

    def last_words(self) -> str:
        """The last lines of its stderr since it was asked."""
        text = self._said.decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-STDERR_LINES:])

    def _listen(self, errors: io.FileIO) -> None:
        """Keeps the last of what libraries print; in a thread, since a full pipe would stop them."""
        with errors:
            while piece := errors.read(STDERR_BYTES):
                self._said = (self._said + piece)[-STDERR_BYTES:]


def _widen(pipe: IO[bytes] | None) -> None:
    """Makes a pipe large, where Linux allows it: a user has a budget for all of them."""
    if sys.platform == "linux" and pipe is not None:
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def worker_command() -> list[str]:
    """The command line of the process: this Python, its flags that say what to import from where, its search path."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise TrtbuildError(
            "This program cannot start the process that reads images.",
            expected="sys.executable, the path of a Python interpreter",
            got=f"{sys.executable!r} of a frozen program" if sys.executable else repr(sys.executable),
            hint="run trtbuild in an ordinary Python installation",
        )
    flags = {"-I": sys.flags.isolated, "-E": sys.flags.ignore_environment, "-s": sys.flags.no_user_site}
    root = str(Path(trtbuild.__file__).parents[1])  # last, for a search path that was relative to another folder
    paths = [path for path in sys.path if isinstance(path, str)]
    return [sys.executable, *(flag for flag, given in flags.items() if given), "-c", CODE, *paths, root]


def death(case: str, files: Sequence[Path], child: Child) -> WorkerDied:
    """What to tell the user about a process that has ended over a case: how far it was, how it ended, the cause."""
    code, stage, said = child.exit_code(), child.stage, child.last_words()
    what, end, hint = _cause(code)
    doing = "before it began to read" if stage is None else f"while {stage.name} ({stage.amount})"
    free = available_memory()
    memory = (
        f"; {free / 1e9:.1f} GB of memory are available now" if free is not None and code == -signal.SIGKILL else ""
    )
    return WorkerDied(
        what,
        got=f"{end} {doing}{memory}" + (f"\n{said}" if said else ""),
        where=f"case {case}: {', '.join(map(str, files))}",
        hint=hint,
    )


def _cause(code: int) -> tuple[str, str, str]:
    """The likely cause of an exit code in a sentence, the code in words, and what to do."""
    if code >= 0:
        return "The process that reads images ended by itself.", f"exit code {code}", "predict this case again"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    if -code == signal.SIGKILL:
        what = "The process that reads images was killed, probably by the system for lack of memory."
        return what, name, "check the spacing in the file's header, or predict on a machine with more memory"
    if -code in CRASHES:
        what = "The image library crashed on this case."
        return what, name, "open the file in a viewer; if it is damaged, copy or export it again"
    return "The process that reads images was ended from outside.", name, "predict this case again"
