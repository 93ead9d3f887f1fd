"""What this package raises on purpose: messages of the same four parts as trtbuild's.

CalibrationError      cases, patches, an observation, its state or a table cannot be used
└── CacheError        a calibration cache of TensorRT's is cut, damaged, or of another network
"""

from __future__ import annotations


class CalibrationError(Exception):
    """An error for the user. ``str()`` is the message that the command line prints.

    Args:
        what: one sentence that says what is wrong.
        expected: what would have been right.
        got: what came instead.
        where: file, key, tensor, case or patch.
        hint: the next step, as a command or an action.
    """

    def __init__(
        self, what: str, *, expected: object = None, got: object = None, where: object = None, hint: str | None = None
    ) -> None:
        self.what, self.expected, self.got, self.where, self.hint = what, expected, got, where, hint
        parts = (("expected", expected), ("got", got), ("where", where), ("next", hint))
        super().__init__(
            "\n".join([what, *(f"  {name + ':':<9} {value}" for name, value in parts if value is not None)])
        )


class CacheError(CalibrationError):
    """A calibration cache of TensorRT's is cut, damaged, or of another network."""
