"""The logits of every tile through one runner, in order. A window that is constant is computed once.

Air around a body is one number after the clipping of CT, and zero after a masked z-score: whole windows hold the same
vector of channels in every voxel. The network's answer to such a window is always the same, mirrored or not, so it is
computed for the first tile and used again for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.tiles import Start, Tile, mirrored, patch3, window_from_image
from trtbuild.spec import ModelSpec

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner

Window = NDArray[np.float32]


def constant_of(window: Window) -> bytes | None:
    """The channels' values where every voxel of the window (C, z, y, x) holds the same ones, else None.

    Compared bit for bit, so that 0 and -0 are two constants.
    """
    bits = window.view(np.uint32)
    first = bits[:, :1, :1, :1]
    middle = tuple(slice(n // 2, n // 2 + 1) for n in window.shape[1:])
    for part in (bits[:, -1:, -1:, -1:], bits[(slice(None), *middle)], bits):  # two voxels settle nearly every window
        if not np.array_equal(part, np.broadcast_to(first, part.shape)):
            return None
    return first.tobytes()


def repeated_starts(image: Window, starts: Sequence[Start], size: tuple[int, int, int]) -> frozenset[Start]:
    """The windows that hold the commonest constant; none unless at least two do.

    Only one constant is kept, which is one window of logits: a model of 105 classes needs 880 MB for one of 128³.
    """
    constants = {start: constant_of(window_from_image(image, start, size)) for start in starts}
    counts = Counter(value for value in constants.values() if value is not None)
    if not counts:
        return frozenset()
    value, count = counts.most_common(1)[0]
    return frozenset(start for start in starts if constants[start] == value) if count > 1 else frozenset()


def logits_of_tiles(
    image: Window, tiles: Sequence[Tile], same: frozenset[Start], spec: ModelSpec, runner: Runner
) -> Generator[Window, None, None]:
    """Logits (heads, z, y, x) of every tile, in its order, as the network gives them (mirrored where the tile is).

    Args:
        image: the padded case (C, Z, Y, X).
        tiles: what to run.
        same: starts of windows that all hold one constant (`repeated_starts`).
        spec: the model.
        runner: the fold's engine. An array holds until the next one is asked for.
    """
    reused = [tile for tile in tiles if tile.start in same]
    once = reused[:1] if len(reused) > 1 else []
    computed = [tile for tile in tiles if not once or tile.start not in same or tile is once[0]]
    size = patch3(spec)
    stream = runner.stream(_batches(image, computed, spec, runner.describe().batch))
    results = (one.reshape(-1, *size) for logits in stream for one in logits)
    kept: Window | None = None
    for tile in tiles:
        if not once or tile.start not in same:
            yield next(results)
        else:
            if kept is None:
                kept = next(results).copy()
            yield kept


def _batches(image: Window, tiles: Sequence[Tile], spec: ModelSpec, size: int) -> Iterator[Window]:
    shape = patch3(spec)
    for first in range(0, len(tiles), size):
        group = tiles[first : first + size]
        batch = np.empty((len(group), len(image), *spec.patch), dtype=np.float32)
        for into, tile in zip(batch, group, strict=True):
            into.reshape(len(image), *shape)[...] = mirrored(window_from_image(image, tile.start, shape), tile.flip)
        yield batch
