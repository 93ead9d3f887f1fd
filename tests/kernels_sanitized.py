"""Runs the fixed checks on sanitized kernels, which must be loaded into a process with AddressSanitizer.

    LD_PRELOAD=libasan.so python kernels_sanitized.py KERNELS.so ["name of a check" ...]

Arrays come from malloc, of exactly their size, so that a read or write beside them is seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

from host_kernels import HostKernels
from kernel_checks import FIXED, Host
from preparation_checks import check_preparation

CHECKS = {**FIXED, "preparation": check_preparation}


def main(library: str, *names: str) -> None:
    for name in names or CHECKS:
        CHECKS[name](Host(kernels=HostKernels(Path(library)), exact=True))
    print("all checks passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
