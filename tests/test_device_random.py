"""Random small models and images on the fake GPU: every plan gives the labels of the CPU path."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from device_samples import Example, check_unharmed, fake_gpu, opened_bench
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from specs import make_spec

from trtbuild.errors import InputError
from trtbuild.runtime import Settings
from trtbuild.spec import Labels, NoNormalization


def labels(heads: int, regions: bool, largest: int) -> Labels:
    values = tuple(int(v) for v in np.linspace(1 if regions else 0, largest, heads).round())
    names = {"background": (0,)} | {f"label {n}": (v,) for n, v in enumerate(values) if v}
    return Labels(
        decision="regions" if regions else "argmax", values=values, names=names,
        foreground=tuple(v for v in values if v), ignore=None,
    )  # fmt: skip


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Any order of axes, spacing and crop; patches with axes of 1; more or fewer tiles than the engine takes."""
    dimensions = draw(st.sampled_from([2, 3, 3]))
    forward = draw(st.sampled_from(list(permutations(range(3)))))
    heads, regions = draw(st.integers(2, 7)), draw(st.booleans())
    channels = draw(st.integers(1, 2))
    spec = make_spec(
        configuration=f"{dimensions}d",
        channels=tuple(f"channel {n}" for n in range(channels)),
        normalization=(NoNormalization(),) * channels,
        patch=tuple(draw(st.integers(1, 7)) for _ in range(dimensions)),
        spacing=tuple(draw(st.sampled_from([0.7, 1.0, 1.6])) for _ in range(dimensions)),
        transpose_forward=forward,
        transpose_backward=tuple(int(n) for n in np.argsort(forward)),
        labels=labels(heads, regions, draw(st.sampled_from([heads, 255, 256, 999]))),
    )
    batch = draw(st.integers(1, 6))
    example = Example(
        spec=spec,
        shape=(channels, *(draw(st.integers(2, 13)) for _ in range(3))),
        spacing=(draw(st.sampled_from([0.8, 1.0, 1.9])), 1.0, draw(st.sampled_from([1.0, 1.3]))),
        folds=draw(st.integers(1, 3)),
        axes=tuple(axis for axis in range(dimensions) if draw(st.booleans())),
        batch=batch,
        smallest=draw(st.integers(1, batch)),
        rim=draw(st.integers(0, 1)),
        kind=draw(st.sampled_from(["float32", "float16"])),
        settings=Settings(
            step_size=draw(st.sampled_from([0.5, 0.7, 1.0])),
            accumulator=draw(st.sampled_from(["float32", "float16"])),
            probabilities=draw(st.booleans()),
        ),
    )
    try:
        example.prepared()
    except InputError:  # thinner than half a voxel of the model
        reject()
    return example


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(example=examples(), choice=st.integers(0, 100))
def test_any_plan_for_any_case_gives_the_labels_of_the_cpu_path(example: Example, choice: int) -> None:
    with fake_gpu() as cuda:
        with opened_bench(cuda, example) as one:
            expected = one.on_cpu()
            plans = list(one.every_plan())
            found = one.with_plan(plans[choice % len(plans)])
            np.testing.assert_array_equal(found.segmentation, expected.segmentation)
            assert found.segmentation.dtype == expected.segmentation.dtype
            if example.settings.probabilities:
                np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=2e-6)
        check_unharmed(cuda)
