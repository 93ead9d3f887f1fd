"""The next image goes to the (fake) GPU while a case runs there: the same files, and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_bundles import NamedEngine, device_bundle, give_engines, networks_of
from device_samples import check_unharmed, fake_gpu
from fake_cuda import CUBIN, Cuda
from null_bundles import END, FIRST, SECOND, SPEC, write_cases
from numpy.typing import NDArray

from trtbuild.cli import run
from trtbuild.config import PredictConfig
from trtbuild.errors import Cancelled
from trtbuild.runtime.device import Buffer, opened_device
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu
from trtbuild.runtime.gpu.uploads import Uploads, opened_uploads
from trtbuild.steps.folder_run.cases import predict_cases
from trtbuild.steps.folder_run.flow import Events
from trtbuild.steps.folder_run.local import LocalWorker
from trtbuild.steps.folder_run.record import RECORD

STAGING = 96
"""Bytes: halves of 48, or 12 float32."""


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@pytest.fixture
def gpu(cuda: Cuda) -> Iterator[Gpu]:
    with opened_device() as device, opened_gpu(device, CUBIN, STAGING) as opened:
        yield opened


def image(dtype: Any = np.float32, shape: tuple[int, ...] = (2, 3, 4, 5), seed: int = 0) -> NDArray[Any]:
    return (np.random.default_rng(seed).standard_normal(shape) * 100).astype(dtype)


def found_in(buffer: Buffer, like: NDArray[Any], gpu: Gpu) -> NDArray[np.float32]:
    result = np.empty(like.shape, dtype=np.float32)
    gpu.download(result, buffer)
    buffer.close()
    return result


@pytest.mark.parametrize("steps", [1, 2, 6, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.float64, np.uint8, np.bool_])
def test_an_image_that_is_taken_is_whole_however_far_it_was(gpu: Gpu, dtype: Any, steps: int) -> None:
    data = image(dtype)
    with opened_uploads(gpu, STAGING) as uploads:
        for _ in range(steps):
            uploads.step(data)
        buffer = uploads.taken(data)
        assert buffer is not None
        assert not any(queue.work for queue in gpu.device.cuda.streams.values()), "nothing is under way any more"
        np.testing.assert_array_equal(found_in(buffer, data, gpu), data.astype(np.float32))
        assert uploads.taken(data) is None, "it is the caller's now"


def test_a_step_begins_one_copy_and_none_when_all_are_begun(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = gpu.device.cuda.memcpy_htod_async

    def counting(to: int, source: NDArray[Any], stream: Any) -> None:
        copied.append(source.nbytes)
        copy(to, source, stream)

    monkeypatch.setattr(gpu.device.cuda, "memcpy_htod_async", counting)
    data = image()  # two channels of 60 numbers, 12 at a time
    with opened_uploads(gpu, STAGING) as uploads:
        for count in range(1, 13):
            uploads.step(data)
            assert copied == [48] * min(count, 10)


def test_only_the_very_image_is_handed_out(gpu: Gpu) -> None:
    first, second = image(), image(seed=1)
    with opened_uploads(gpu, STAGING) as uploads:
        assert uploads.taken(first) is None
        uploads.step(first)
        assert uploads.taken(first.copy()) is None
        uploads.step(second)
        assert uploads.taken(first) is None, "the second took its place"
        buffer = uploads.taken(second)
        assert buffer is not None
        np.testing.assert_array_equal(found_in(buffer, second, gpu), second)


@pytest.mark.parametrize("data", [image(shape=(3, 4)), image(shape=(1, 0, 4, 5)), image(np.complex64)])
def test_what_cannot_be_an_image_waits_for_the_error_of_the_preparation(gpu: Gpu, data: NDArray[Any]) -> None:
    with opened_uploads(gpu, STAGING) as uploads:
        uploads.step(data)
        assert uploads.taken(data) is None


@pytest.mark.parametrize("free", [0, 1, 2 * 480 - 1])
def test_without_room_for_two_nothing_goes_ahead(gpu: Gpu, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = image()
    with opened_uploads(gpu, STAGING) as uploads:
        monkeypatch.setattr(gpu.device.cuda, "mem_get_info", lambda: (free, 1 << 30))
        uploads.step(data)
        assert uploads.taken(data) is None
        monkeypatch.setattr(gpu.device.cuda, "mem_get_info", lambda: (2 * 480, 1 << 30))
        uploads.step(data)
        assert uploads.taken(data) is None, "it is asked once for an image"


def test_memory_that_another_program_took_is_no_error(gpu: Gpu, cuda: Cuda) -> None:
    data = image()
    with opened_uploads(gpu, STAGING) as uploads:
        cuda.allocations_left = 0
        uploads.step(data)
        cuda.allocations_left = None
        assert uploads.taken(data) is None


# --- whole runs


class Beside:
    """What the runs of a test took from the uploads, by case."""

    def __init__(self) -> None:
        self.taken: list[bool] = []
        self.buffers: list[Buffer] = []
        self.opened = 0


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Beside:
    """The "process beside" answers at once, so that the next image is there when a case begins."""
    seen = Beside()

    @contextmanager
    def worker() -> Iterator[LocalWorker]:
        yield LocalWorker()

    class Watched(Uploads):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            seen.opened += 1

        def taken(self, data: NDArray[Any]) -> Buffer | None:
            buffer = super().taken(data)
            seen.taken.append(buffer is not None)
            seen.buffers += [buffer] if buffer is not None else []
            return buffer

    monkeypatch.setattr("trtbuild.steps.folder_run.cases.open_worker", worker)
    monkeypatch.setattr("trtbuild.runtime.gpu.uploads.Uploads", Watched)
    return seen


@pytest.fixture
def engines(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> list[NamedEngine]:
    return give_engines(monkeypatch, cuda, networks_of() | networks_of(FIRST, SECOND))


def words(bundle: Path, images: Path, out: Path, *more: str) -> list[str]:
    return ["predict", str(bundle), "-i", str(images), "-o", str(out), "--backend", "tensorrt", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != RECORD}


@pytest.mark.parametrize("specs", [(SPEC,), (FIRST, SECOND)])
def test_images_that_went_ahead_give_the_same_files(
    tmp_path: Path, engines: list[NamedEngine], beside: Beside, specs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is not there any more when its own case goes through the network, which needs the memory."""
    enqueue, there = NamedEngine.enqueue, list[bool]()

    def noting(self: NamedEngine, *values: int) -> None:
        there.extend(not buffer.closed for buffer in beside.buffers)
        enqueue(self, *values)

    monkeypatch.setattr(NamedEngine, "enqueue", noting)
    bundle, images = device_bundle(tmp_path / "b.trtb", *specs), write_cases(tmp_path / "images", *"abc")
    assert run(words(bundle, images, tmp_path / "in turn", "-npp", "0")) == 0
    assert (beside.opened, beside.taken) == (0, [])
    assert run(words(bundle, images, tmp_path / "ahead")) == 0
    assert [taken for taken in beside.taken if taken] == [True, True], "all but the first"
    assert there
    assert not any(there)
    assert contents(tmp_path / "ahead") == contents(tmp_path / "in turn")
    assert engines == []


def test_a_limit_of_its_memory_is_for_one_case(tmp_path: Path, engines: list[NamedEngine], beside: Beside) -> None:
    bundle, images = device_bundle(tmp_path / "b.trtb"), write_cases(tmp_path / "images", *"ab")
    assert run(words(bundle, images, tmp_path / "out", "--max-device-memory", "1G")) == 0
    assert beside.opened == 0


def test_a_case_that_cannot_be_prepared_fails_alone_and_by_name(
    tmp_path: Path, engines: list[NamedEngine], beside: Beside, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its image was on the GPU already."""
    bundle, images = device_bundle(tmp_path / "b.trtb"), write_cases(tmp_path / "images", *"abc")
    import SimpleITK as sitk

    file = str(images / f"b_0000{END}")
    read = sitk.ReadImage(file, sitk.sitkFloat32)
    voxels = sitk.GetArrayFromImage(read)
    voxels[4, 5, 6] = np.nan
    broken = sitk.GetImageFromArray(voxels)
    broken.CopyInformation(read)
    sitk.WriteImage(broken, file)
    assert run(words(bundle, images, tmp_path / "out")) == 4
    assert "case b: " in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").glob(f"*{END}")} == {f"a{END}", f"c{END}"}


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_run_that_is_stopped_gives_back_what_went_ahead(
    tmp_path: Path, engines: list[NamedEngine], beside: Beside, stop_at: int
) -> None:
    bundle, images = device_bundle(tmp_path / "b.trtb"), write_cases(tmp_path / "images", *"ab")
    calls: list[int] = []

    def progress(stage: str, done: int, total: int) -> bool:
        calls.extend([done] if stage == "network" else [])
        return len(calls) < stop_at

    config = PredictConfig(bundles=(bundle,), inputs=(images,), output=tmp_path / "out", backend="tensorrt")
    with pytest.raises(Cancelled):
        predict_cases(config, Events(progress=progress))
    assert engines == []
