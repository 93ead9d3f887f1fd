"""An image that is in the fake GPU's memory becomes labels there: those of the CPU path, without a copy to the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from device_samples import EXAMPLES, PLAIN, SPLINE, Bench, Example, check_unharmed, fake_gpu, opened_bench
from fake_cuda import Cuda, LaunchError
from gpu_arrays import Interface, Shared, on_gpu
from numpy.typing import NDArray
from test_device_prepare import on_host

from trtbuild.errors import Cancelled, EngineError, InputError, OutOfMemory, TrtbuildError
from trtbuild.runtime import Member, Settings
from trtbuild.runtime.gpu import entry as device_entry
from trtbuild.runtime.gpu.attempts import IN_HALF
from trtbuild.runtime.gpu.case import NOT_LINEAR
from trtbuild.runtime.gpu.entry import DevicePrediction, prediction_from_device_array
from trtbuild.runtime.gpu.plan import device_plans
from trtbuild.runtime.gpu.prepare import prepared_on_device
from trtbuild.runtime.on_device import OnDevice
from trtbuild.runtime.predictor import EMPTY, Clock, Progress, prediction_from_prepared
from trtbuild.spec import ZScore
from trtbuild.volume import prepared_from_array


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test; sizes count in bytes."""
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.SLAB_BYTES", 2000)
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An example whose image is on the device."""

    one: Bench
    example: Example
    there: NDArray[Any]

    def member(self, limit: int | None = None) -> Member:
        place = OnDevice(gpu=self.one.gpu, engines=tuple(self.one.engines), limit=limit)
        return replace(self.one.member, device=place)

    def predicted(
        self, image: Any = None, progress: Progress | None = None, limit: int | None = None
    ) -> DevicePrediction:
        image = Shared(array=self.there) if image is None else image
        return prediction_from_device_array(
            image, self.example.spacing, self.member(limit), self.one.settings, progress
        )

    def left(self) -> int:
        """Allocations besides the image's own."""
        return len(self.one.cuda.live) - 1

    def expected(self) -> NDArray[Any]:
        """The CPU path's labels, of the very values that the device prepares."""
        prepared = prepared_on_device(np.array(self.there), self.example.spacing, self.example.spec, self.one.gpu)
        same = on_host(prepared, self.one.gpu)
        prepared.close()
        return prediction_from_prepared(same, self.one.member, self.one.settings, None, Clock()).segmentation


@contextmanager
def entered(cuda: Cuda, example: Example, dtype: str = "float32") -> Iterator[Entry]:
    with ExitStack() as stack:
        one = stack.enter_context(opened_bench(cuda, example))
        there = stack.enter_context(on_gpu(example.data().astype(dtype), one.gpu))
        yield Entry(one=one, example=example, there=there)


def values(found: DevicePrediction, cuda: Cuda) -> NDArray[Any]:
    labels = found.labels
    size = int(np.prod(labels.shape)) * labels.dtype.itemsize
    return cuda.at(labels.address, size).view(labels.dtype).reshape(labels.shape).copy()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_labels_are_those_of_the_cpu_path(cuda: Cuda, name: str) -> None:
    with entered(cuda, EXAMPLES[name]) as entry:
        expected, before = entry.expected(), entry.there.copy()
        found = entry.predicted()
        assert found.labels.dtype == expected.dtype
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(values(found, cuda), expected)
        np.testing.assert_array_equal(entry.there, before)
        assert found.warnings == ()
        assert {"prepare", "network", "back"} <= set(found.seconds)
        assert entry.left() == 1, "the labels"
        found.labels.close()
        assert entry.left() == 0


def test_they_are_also_those_of_an_image_that_the_cpu_prepares(cuda: Cuda) -> None:
    spec = replace(PLAIN, normalization=(ZScore(masked=True),), spacing=(1.3, 0.8, 1.0))
    with entered(cuda, Example(spec=spec, rim=2, axes=(1,))) as entry:
        prepared = prepared_from_array(entry.there, entry.example.spacing, spec)
        theirs = prediction_from_prepared(prepared, entry.one.member, entry.one.settings, None, Clock()).segmentation
        found = entry.predicted()
        assert found.grid == prepared.grid
        assert (values(found, cuda) != theirs).mean() < 1e-3  # 1e-6 of the intensities decides between near equals
        found.labels.close()


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint8", "int16", "uint16", "int32", "bool"])
def test_other_types_become_float32_on_the_device(cuda: Cuda, dtype: str) -> None:
    with entered(cuda, EXAMPLES["two channels"], dtype) as entry:
        if dtype == "bool":
            entry.there[...] = np.indices(entry.there.shape).sum(axis=0) % 3 == 0
        expected = entry.expected()
        for image in (Shared(array=entry.there), Interface(array=entry.there)):
            found = entry.predicted(image)
            np.testing.assert_array_equal(values(found, cuda), expected)
            found.labels.close()
            assert entry.left() == 0


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_an_image_may_lie_in_memory_in_any_way(cuda: Cuda, dtype: str) -> None:
    with entered(cuda, EXAMPLES["two channels"], dtype) as entry:
        for view in (entry.there.transpose(0, 3, 2, 1), entry.there[:, ::-1, :, ::-1], entry.there[:, :, 1:, 2:]):
            same = replace(entry, there=view)
            expected = same.expected()
            for image in (Shared(array=view), Interface(array=view)):
                found = same.predicted(image)
                np.testing.assert_array_equal(values(found, cuda), expected)
                found.labels.close()


def test_neither_the_image_nor_the_labels_come_to_the_host(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = {"memcpy_htod_async": 0, "memcpy_dtoh_async": 0}

    def counting(name: str, host: int) -> None:
        real = getattr(cuda, name)

        def copy(*arguments: Any) -> None:
            copied[name] += arguments[host].nbytes
            real(*arguments)

        monkeypatch.setattr(cuda, name, copy)

    example = Example(shape=(1, 48, 50, 52), batch=8, spec=replace(PLAIN, patch=(24, 24, 24)))
    with entered(cuda, example) as entry:
        counting("memcpy_htod_async", 1)
        counting("memcpy_dtoh_async", 0)
        found = entry.predicted()
        assert copied["memcpy_htod_async"] < entry.there.nbytes / 50
        assert copied["memcpy_dtoh_async"] < entry.there.size / 500
        found.labels.close()


def test_logits_that_end_on_the_host_come_back_as_labels(cuda: Cuda) -> None:
    with entered(cuda, Example(spec=SPLINE, spacing=(1.4, 0.7, 1.2))) as entry:
        expected = entry.expected()
        found = entry.predicted()
        np.testing.assert_array_equal(values(found, cuda), expected)
        assert found.warnings == (NOT_LINEAR,)
        found.labels.close()


def test_an_image_of_zeros_is_told(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["3D"]) as entry:
        entry.there[...] = 0
        found = entry.predicted()
        np.testing.assert_array_equal(values(found, cuda), entry.expected())
        assert found.warnings == (EMPTY,)
        found.labels.close()


# --- what is refused


def test_values_that_are_not_finite_are_named_as_the_cpu_does(cuda: Cuda) -> None:
    example = EXAMPLES["two channels"]
    for dtype in ("float32", "float16"):
        with entered(cuda, example, dtype) as entry:
            entry.there[1, 3, 4, 5], entry.there[1, 3, 6, 0], entry.there[1, 5, 0, 0] = np.inf, np.nan, np.nan
            with pytest.raises(InputError) as theirs:
                prepared_from_array(entry.there, example.spacing, example.spec)
            with pytest.raises(InputError) as ours:
                entry.predicted()
            assert str(ours.value) == str(theirs.value)
            assert entry.left() == 0


@pytest.mark.parametrize("shape", [(19, 26, 23), (2, 19, 26, 23), (1, 19, 0, 23), (1, 1, 19, 26, 23)])
def test_images_of_a_wrong_shape_are_refused_as_on_the_cpu(cuda: Cuda, shape: tuple[int, ...]) -> None:
    with entered(cuda, EXAMPLES["3D"]) as entry:
        wrong = np.resize(entry.there, shape)
        with pytest.raises(InputError) as theirs:
            prepared_from_array(wrong, (1.0, 1.0, 1.0), PLAIN)
        with on_gpu(wrong, entry.one.gpu) as there, pytest.raises(InputError) as ours:
            entry.predicted(Shared(array=there))
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint32"])
def test_types_that_no_kernel_reads_are_refused(cuda: Cuda, dtype: str) -> None:
    with entered(cuda, EXAMPLES["3D"], dtype) as entry, pytest.raises(InputError, match="does not read") as caught:
        entry.predicted()
    assert "float16" in str(caught.value)


def test_what_else_is_refused(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["3D"]) as entry:
        shared, member = Shared(array=entry.there), entry.member()
        cascade = replace(member, spec=replace(PLAIN, previous_stage="3d_lowres"))
        with pytest.raises(InputError, match="previous stage"):
            prediction_from_device_array(shared, (1.0, 1.0, 1.0), cascade, Settings())
        with pytest.raises(InputError, match="three positive numbers"):
            prediction_from_device_array(shared, (1.0, 0.0, 1.0), member, Settings())
        with pytest.raises(InputError, match="Probabilities"):
            prediction_from_device_array(shared, (1.0, 1.0, 1.0), member, Settings(probabilities=True))
        with pytest.raises(EngineError, match="does not run on a GPU"):
            prediction_from_device_array(shared, (1.0, 1.0, 1.0), entry.one.member, Settings())
        assert entry.left() == 0


# --- memory and faults


def test_memory_that_is_short_anywhere_leaves_nothing(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["mirrored"], "int16") as entry:
        expected, ends = entry.expected(), []
        for at in range(40):
            cuda.allocations_left = at
            try:
                found = entry.predicted()
            except OutOfMemory:
                assert entry.left() == 0
                continue
            ends.append(at)
            np.testing.assert_array_equal(values(found, cuda), expected)
            found.labels.close()
            if cuda.allocations_left:
                break
        cuda.allocations_left = None
        assert ends
        assert ends[0] >= 8, "the copy, words, the case, the labels, tables, patches, logits, the sum"


def test_memory_that_is_short_once_begins_again_and_is_told(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["mirrored"]) as entry:
        expected = entry.expected()
        entry.one.runners[0].out_of_memory = 1
        found = entry.predicted()
        np.testing.assert_array_equal(values(found, cuda), expected)
        assert len(found.warnings) == 1
        assert "begins again" in found.warnings[0]
        found.labels.close()


def test_a_limit_is_kept(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["mirrored"], "int16") as entry:
        expected, own = entry.expected(), entry.there.nbytes
        cuda.peak = 0
        entry.predicted().labels.close()
        limit = cuda.peak - own
        for share in (1.0, 0.95, 0.9):
            cuda.peak = 0
            found = entry.predicted(limit=int(share * limit))
            assert cuda.peak - own <= int(share * limit)
            np.testing.assert_array_equal(values(found, cuda), expected)
            found.labels.close()
        with pytest.raises(OutOfMemory):
            entry.predicted(limit=1000)
        assert entry.left() == 0


def test_labels_that_do_not_fit_are_what_is_named(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["3D"]) as entry:
        case = 4 * entry.there.size  # nothing is cropped or resampled
        with pytest.raises(OutOfMemory, match="The labels do not fit") as caught:
            entry.predicted(limit=case + 1000)
        assert "raise the limit" in str(caught.value)
        assert entry.left() == 0


def test_float16_under_a_limit_is_told(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["mirrored"]) as entry:
        case = entry.one.case
        held = 4 * entry.there.size + case.whole_label_bytes
        resident = replace(case, resident=True, labels_stay=True)
        (least,) = list(device_plans(resident, ("float32",)))[-1:]
        found = entry.predicted(limit=held + least.nbytes)
        assert found.warnings == ()
        found.labels.close()
        found = entry.predicted(limit=held + least.nbytes - 1)
        assert found.warnings == (IN_HALF,)
        found.labels.close()


def test_a_gpu_that_is_lost_when_the_image_is_released_leaves_nothing(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = device_entry._prepared

    def lost(*arguments: Any) -> Any:
        prepared = real(*arguments)
        cuda.fail_next = LaunchError("an illegal memory access was encountered")
        return prepared

    monkeypatch.setattr(device_entry, "_prepared", lost)
    with entered(cuda, EXAMPLES["3D"]) as entry:
        with pytest.raises(EngineError, match="illegal memory access"):
            entry.predicted()
        assert entry.left() == 0


@pytest.mark.parametrize("how", ["stopped", "failed", "lost"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_case_that_ends_early_leaves_nothing(cuda: Cuda, how: str, at: int) -> None:
    with entered(cuda, replace(EXAMPLES["mirrored"], batch=2)) as entry:
        calls = 0
        if how == "failed":
            entry.one.runners[0].fail_at = at

        def progress(stage: str, done: int, total: int) -> bool:
            nonlocal calls
            calls += 1
            if how == "lost" and calls == at:
                cuda.fail_next = LaunchError("an illegal memory access was encountered")
            return how != "stopped" or calls < at

        with pytest.raises(TrtbuildError) as caught:
            entry.predicted(progress=progress)
        assert isinstance(caught.value, Cancelled if how == "stopped" else EngineError)
        assert entry.left() == 0
