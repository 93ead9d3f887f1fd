"""`python -m trtbuild` and the console script."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Runs the command line. Ctrl-C ends it with 130 and one line from here on, also while it is being imported."""
    try:
        raise SystemExit(_run())
    except KeyboardInterrupt:  # between two handlers, or behind the last one
        _say()
        raise SystemExit(INTERRUPTED) from None


def _run() -> int:
    """Imports the command line below a handler that cannot be swallowed: an import may catch all that is raised."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as behind nohup
        from trtbuild.cli import run

        return run()
    signal.signal(signal.SIGINT, _stop)
    from trtbuild.cli import run

    signal.signal(signal.SIGINT, before)
    return run()


def _stop(signal_number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """Ends the process at once: nothing was begun that has to be tidied up."""
    _say()
    os._exit(INTERRUPTED)


def _say() -> None:
    with contextlib.suppress(OSError):  # there is no stderr
        os.write(2, b"Interrupted.\n")


if __name__ == "__main__":
    main()
