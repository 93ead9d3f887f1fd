"""What TensorRT says in its log: there alone it tells why it refused something."""

from __future__ import annotations

import weakref
from typing import Any

from trtbuild.nvinfer import kept_logger


class Errors:
    """What TensorRT logged as errors: it returns None or False, and tells the reason there alone."""

    def __init__(self) -> None:
        self.rows: list[str] = []


def error_log(module: Any, errors: Errors) -> Any:
    """A logger that adds to `errors` while somebody else holds them; itself it lives on (`kept_logger`)."""
    held = weakref.ref(errors)

    class ErrorLog(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            errors = held()
            if errors is not None and severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                errors.rows.append(message)

    return kept_logger(ErrorLog())
