"""Settings that every test shares."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# nnU-Net warns about these at import where they are unset; the tests never use them
for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ.setdefault(name, "/nonexistent")


@pytest.fixture(autouse=True)
def ctrl_c() -> None:
    """Every test starts with Python's own handler, whatever a library or a test before it did to the process: without
    one, a test that interrupts itself would end the process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
