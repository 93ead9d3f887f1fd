"""A patch that looks like an image to the network: what exports are checked on, and what goldens are made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtbuild.spec import CT, ModelSpec, Normalization, RescaleTo01, RGBTo01, ZScore

STRUCTURES = 6  # ellipsoids in the body
WAVES = 4  # plane waves of a smooth field, up to two periods per patch
NOISE = 0.05  # standard deviation, where the structures lie in 0..1


def realistic_patch(spec: ModelSpec, seed: int) -> NDArray[np.float32]:
    """A seeded patch of smooth structures with noise, normalised as the model normalises images.

    White noise would be no test: instance norm flattens it, and the network's logits hardly move. The one-hot channels
    of a previous stage hold a partition into its labels.

    Returns:
        float32, (network_channels, *patch).
    """
    rng = np.random.default_rng(seed)
    body = _ellipsoid(rng, spec.patch, size=0.9)
    images = [_normalized(scheme, _intensities(rng, body), body) for scheme in spec.normalization]
    if spec.previous_stage is not None:
        regions = (_smooth(rng, spec.patch) * (len(spec.labels.foreground) + 1)).astype(np.int64)
        images += [((regions == number) & body).astype(np.float32)
                   for number in range(1, len(spec.labels.foreground) + 1)]  # fmt: skip
    return np.stack(images).astype(np.float32)


def _intensities(rng: np.random.Generator, body: NDArray[np.bool_]) -> NDArray[np.float32]:
    """About 0..1 inside the body, near 0 outside."""
    image = 0.3 + 0.3 * _smooth(rng, body.shape)
    for _ in range(STRUCTURES):
        image[_ellipsoid(rng, body.shape, size=0.35)] += np.float32(rng.uniform(-0.3, 0.3))
    image[~body] = 0
    return image + NOISE * rng.standard_normal(body.shape, dtype=np.float32)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A smooth field in [0, 1)."""
    axes = [np.linspace(0, 2 * np.pi, size, dtype=np.float32) for size in shape]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    field = np.zeros(shape, np.float32)
    for _ in range(WAVES):
        frequencies, phase = rng.uniform(-2, 2, len(shape)), np.float32(rng.uniform(0, 2 * np.pi))
        field += np.sin(sum(np.float32(f) * axis for f, axis in zip(frequencies, grid, strict=True)) + phase)
    return np.clip((field + WAVES) / (2 * WAVES), 0, 1 - 1e-6).astype(np.float32)


def _ellipsoid(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> NDArray[np.bool_]:
    """Radii of `size` in half patches, the centre anywhere where half of it stays inside."""
    axes = [(2 * np.arange(length, dtype=np.float32) + 1) / length - 1 for length in shape]  # centres of voxels
    centre, radii = rng.uniform(size - 1, 1 - size, len(shape)), rng.uniform(0.7 * size, size, len(shape))
    squares = [((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)]
    total = sum(np.meshgrid(*squares, indexing="ij", sparse=True))
    inside: NDArray[np.bool_] = np.asarray(total < 1)
    inside[tuple(length // 2 for length in shape)] = True  # never empty, however small the patch
    return inside


def _normalized(scheme: Normalization, image: NDArray[np.float32], body: NDArray[np.bool_]) -> NDArray[np.float32]:
    relative = (image - image.min()) / max(float(np.ptp(image)), 1e-8)
    if isinstance(scheme, CT):
        raw = scheme.lower + (1.2 * relative - 0.1) * (scheme.upper - scheme.lower)  # 10 % beyond: both ends clip
        clipped = np.clip(raw, scheme.lower, scheme.upper)
        return np.asarray((clipped - scheme.mean) / max(scheme.std, 1e-8), np.float32)
    if isinstance(scheme, RescaleTo01 | RGBTo01):
        return np.asarray(relative, np.float32)
    # Images that are not normalised have a scale that nobody wrote down; unit variance is as good a guess as any.
    masked = isinstance(scheme, ZScore) and scheme.masked
    values = image[body] if masked else image
    normalized = (image - values.mean()) / max(float(values.std()), 1e-8)
    return np.where(body, normalized, np.float32(0)) if masked else normalized
