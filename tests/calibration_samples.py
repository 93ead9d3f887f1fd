"""Makers for the tests of trtbuild_calibration: preprocessed cases as nnU-Net writes them, and a network of NumPy."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEMO = Path(__file__).parents[1] / "benchmarks/demo/preprocessed/Dataset501_MNI152Tissue"
DEMO_CASES = DEMO / "nnUNetPlans_3d_fullres"


def image(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def labels(*shape: int, seed: int = 0, values: Sequence[int] = (-1, 0, 1, 2)) -> NDArray[np.int16]:
    return np.random.default_rng(seed).choice(np.array(values, np.int16), shape)


def write_blosc(path: Path, array: NDArray[Any]) -> None:
    import blosc2

    blosc2.asarray(np.ascontiguousarray(array), urlpath=str(path), mode="w")


def write_case(folder: Path, name: str, kind: str, data: NDArray[Any], seg: NDArray[Any] | None) -> None:
    """One case as nnU-Net v2 leaves it, with a pickle that must never be opened."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.pkl").write_bytes(b"this is no pickle")
    if kind == "npz":
        np.savez_compressed(folder / f"{name}.npz", data=data, **({} if seg is None else {"seg": seg}))
        return
    write = write_blosc if kind == "b2nd" else np.save
    write(folder / f"{name}.{kind}", data)
    if seg is not None:
        write(folder / f"{name}_seg.{kind}", seg)


class NumpyNetwork:
    """A chain of tensors: `t0` is the patch, each next one is `factor` times a rolled copy of the one before.

    It keeps a record: which graphs were opened, how many of its arrays are alive at each call, and after how many
    passes it fails.
    """

    def __init__(self, tensors: int = 4, *, fail_after: int | None = None, spoil: Any = None) -> None:
        self.names = [f"t{i}" for i in range(tensors)]
        self.fail_after, self.spoil = fail_after, spoil
        self.passes = 0
        self.opened: list[tuple[str, ...]] = []
        self.alive_at_call: list[int] = []
        self._made: list[weakref.ref[Any]] = []

    def sizes(self) -> Mapping[str, int]:
        return {name: 1000 * (i + 1) for i, name in enumerate(self.names)}

    def tensor(self, patch: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        number = self.names.index(name)
        return (np.roll(patch, number) * np.float32(0.5 + number)).astype(np.float32)

    @contextlib.contextmanager
    def maxima(self) -> Iterator[Any]:
        self.opened.append(("maxima",))
        yield lambda patch: self._pass({n: float(np.abs(self.tensor(patch, n)).max()) for n in self.names})

    @contextlib.contextmanager
    def outputs(self, names: Sequence[str]) -> Iterator[Any]:
        self.opened.append(tuple(names))

        def run(patch: NDArray[np.float32]) -> Mapping[str, Any]:
            self.alive_at_call.append(sum(made() is not None for made in self._made))
            arrays = {name: self.tensor(patch, name) for name in names}
            self._made += [weakref.ref(array) for array in arrays.values()]
            return self._pass(arrays)

        gc.disable()  # what is dropped must go by itself
        try:
            yield run
        finally:
            gc.enable()

    def _pass(self, result: dict[str, Any]) -> dict[str, Any]:
        if self.fail_after is not None and self.passes >= self.fail_after:
            raise KeyboardInterrupt
        self.passes += 1
        return result if self.spoil is None else self.spoil(self.passes, result)
