"""The error tree: everything that trtbuild raises on purpose.

TrtbuildError
├── MissingExtra          a package of an extra is not installed (the message holds the command)
├── ModelError            the trained-model folder cannot be used
│   └── Untrusted         it could be, if the user says that it may run code
├── GraphError            an ONNX graph is malformed, or a pass broke its contract
├── EngineError           a backend refused or failed
│   ├── PrecisionMismatch the engine computes in another precision than the record says
│   ├── NonFinite         the network returned NaN or infinity
│   └── OutOfMemory       a device or the host has no memory left
├── BundleError           a bundle is wrong; one class per way in which it can be
│   ├── BundleMissing  BundleFormat  BundleKey  BundleFileMissing  BundleFileExtra
│   └── BundleSize  BundleHash  BundlePath  BundleTooLarge
├── InputError            an image, a case or a case list is wrong
├── OutputError           a result cannot be written
│   └── CaseNotWritable   it cannot because of what it is, not because of where it goes: others may be
├── GateFailed            an engine in lower precision is not as good as FP32 (exit code 3)
├── WorkerDied            a process that prepares cases ended by itself
├── SomeCasesFailed       a folder was done, some cases were not (exit code 4)
└── Cancelled             the caller's progress callback asked to stop (exit code 130)

A message has four parts: what was expected, what came, where, and what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class TrtbuildError(Exception):
    """An error for the user. ``str()`` is the message that the command line prints.

    Args:
        what: one sentence that says what is wrong.
        expected: what would have been right.
        got: what came instead.
        where: file, key, tensor or case.
        hint: the next step, as a command or an action.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, expected: object = None, got: object = None, where: object = None, hint: str | None = None
    ) -> None:
        self.what, self.expected, self.got, self.where, self.hint = what, expected, got, where, hint
        parts = (("expected", expected), ("got", got), ("where", where), ("next", hint))
        super().__init__(
            "\n".join([what, *(f"  {name + ':':<9} {value}" for name, value in parts if value is not None)])
        )


class MissingExtra(TrtbuildError):
    """A package that belongs to an extra cannot be imported."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is needed to {purpose}.", hint=f"pip install 'trtbuild[{extra}]'")
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        """Pickling and copying call the class with `args`, which hold the finished message; these are its own."""
        return type(self), (self.package, self.extra, self.purpose)


class ModelError(TrtbuildError):
    """The trained-model folder cannot be used."""


class Untrusted(ModelError):
    """Using the model would run code that it brings along; the user has to say that it may."""


class GraphError(TrtbuildError):
    """An ONNX graph is malformed, or a pass broke its contract."""


class EngineError(TrtbuildError):
    """A backend refused or failed."""


class PrecisionMismatch(EngineError):
    """The opened engine computes in another precision than its record says."""


class NonFinite(EngineError):
    """The network returned NaN or infinity."""


class OutOfMemory(EngineError):
    """The device or the host has no memory left."""


class BundleError(TrtbuildError):
    """A bundle is wrong."""


class BundleMissing(BundleError):
    """There is no bundle at this path."""


class BundleFormat(BundleError):
    """bundle.json is not JSON, or of a format that this version does not read."""


class BundleKey(BundleError):
    """A key of bundle.json is unknown, missing, or holds a value that it must not hold."""


class BundleFileMissing(BundleError):
    """A file that bundle.json lists is not there."""


class BundleFileExtra(BundleError):
    """A file is there that bundle.json does not list."""


class BundleSize(BundleError):
    """A file has another size than bundle.json says."""


class BundleHash(BundleError):
    """A file has another SHA-256 than bundle.json says."""


class BundlePath(BundleError):
    """A path is absolute, leaves the bundle, or is a link."""


class BundleTooLarge(BundleError):
    """bundle.json, or something that it declares, is larger than any real bundle."""


class InputError(TrtbuildError):
    """An image, a case or a list of cases is wrong."""


class OutputError(TrtbuildError):
    """A result cannot be written."""


class CaseNotWritable(OutputError):
    """A result cannot be written because of what it is: its format cannot hold it, or a library refuses it."""


class GateFailed(TrtbuildError):
    """An engine in lower precision loses more than the gate allows; the bundle holds the FP32 engine instead."""

    exit_code: ClassVar[int] = 3


class WorkerDied(TrtbuildError):
    """A process that prepares cases ended by itself: a library crashed, or the system killed it."""


class SomeCasesFailed(TrtbuildError):
    """A folder was worked through, and some of its cases failed."""

    exit_code: ClassVar[int] = 4


class Cancelled(TrtbuildError):
    """The caller's progress callback asked to stop."""

    exit_code: ClassVar[int] = 130
