"""What the verbs have in common: how a command is declared, and how it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trtbuild.options import WordCommand

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
FOLDER = click.Path(path_type=Path, readable=False)  # what cannot be read is refused by who reads it

Decorator = Callable[[Callable[..., None]], click.Command]


class Interrupts:
    """Remembers Ctrl-C. Python drops a KeyboardInterrupt that is raised inside a callback from C, as Numba's loader."""

    seen = False

    def note(self, signal_number: int, frame: object) -> None:
        """The handler of SIGINT: remembers, then raises as Python's own does."""
        self.seen = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was one, even if it was dropped."""
        if self.seen:
            raise KeyboardInterrupt


def interruptible(callback: Callable[..., Any] | None) -> Callable[..., Any]:
    """A progress callback that first raises KeyboardInterrupt if Ctrl-C was pressed and lost."""
    interrupts = click.get_current_context().ensure_object(Interrupts)

    def call(*values: Any) -> Any:
        interrupts.check()
        return None if callback is None else callback(*values)

    return call


def command(name: str) -> Decorator:
    """A verb of the command line, with nnU-Net's one-dash words."""
    return click.command(name, cls=WordCommand, context_settings=CONTEXT)
