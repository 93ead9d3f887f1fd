"""The process beside the network: same results as without it, and whatever happens in it costs one case."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worker_readers
from specs import make_spec
from threadpoolctl import threadpool_limits
from zoo_images import array_from_scene, write_image
from zoo_plans import RECIPES, dataset_from_recipe, plans_from_recipe

from trtbuild import errors
from trtbuild.errors import Cancelled, InputError, MissingExtra, TrtbuildError, WorkerDied
from trtbuild.source.plans import spec_from_plans
from trtbuild.spec import ModelSpec, NoNormalization
from trtbuild.steps.folder_run import child as child_module
from trtbuild.steps.folder_run import worker_main
from trtbuild.steps.folder_run.messages import Done, Failed, receive, send
from trtbuild.steps.folder_run.worker import Reading, Request, Worker, open_worker
from trtbuild.volume import Prepared, prepared_from_array
from trtbuild.volume.image import Image, ItkGeometry
from trtbuild.volume.io import reader_named

PLAIN = make_spec(normalization=(NoNormalization(),))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl are Linux's")


def request(case: str, file: Path | None = None, **changes: object) -> Request:
    values: dict[str, object] = {"files": (file or Path("/") / case,), "specs": (PLAIN,)}
    return Request(case=case, **(values | changes))  # type: ignore[arg-type]


def zoo_case(name: str, kind: str, folder: Path) -> tuple[ModelSpec, tuple[Path, ...]]:
    """Spec and image files of a model of the zoo."""
    recipe = RECIPES[name]
    scene = recipe.scenes[kind]
    count = 1 if recipe.reader == "NaturalImage2DIO" else len(recipe.channels)
    files = tuple(folder / f"{kind}_{channel:04d}{recipe.file_ending}" for channel in range(count))
    array = array_from_scene(scene, len(recipe.channels), recipe.intensity, recipe.seed)
    write_image(files, array, scene, recipe.intensity, recipe.reader)
    spec = spec_from_plans(
        plans_from_recipe(recipe),
        dataset_from_recipe(recipe),
        configuration=recipe.configuration,
        trainer=recipe.trainer,
    )
    return spec, files


def state(pid: int) -> str:
    """Of a process, a letter as in ps; "" where there is none (any more)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends in time; a zombie has ended."""
    end = time.monotonic() + seconds
    while state(pid) not in ("", "Z", "X"):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def busy(worker: Worker, future: Future[Reading], seconds: float = 10) -> int:
    """The process once it reads the case of `future`."""
    end = time.monotonic() + seconds
    while not future.running() or worker._child is None or worker._child.stage is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return worker.pids[0]


@pytest.fixture
def odd_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """See worker_readers."""
    worker_readers.installed(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def plain() -> Iterator[Worker]:
    """A worker with trtbuild's own readers."""
    with open_worker() as worker:
        yield worker


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["main", "zero"])
def test_a_case_is_bit_for_bit_what_it_is_without_the_process(
    name: str, kind: str, plain: Worker, tmp_path: Path
) -> None:
    spec, files = zoo_case(name, kind, tmp_path)
    image = reader_named(spec.reader).read_image(files, spec.channels)
    with threadpool_limits(1, user_api="blas"):  # as `predict` has it; the sums differ with the number of threads
        expected = prepared_from_array(image.data, image.spacing, spec)
    reading = plain.submit(request("case", files=files, specs=(spec, spec))).result()
    assert reading.image.geometry == image.geometry
    assert reading.image.spacing == image.spacing
    assert reading.image.data.shape == (0, *image.data.shape[1:])
    assert reading.image.warnings == image.warnings + (() if kind == "main" else ("every voxel of the image is 0",))
    assert set(reading.seconds) == {"read", "prepare"}
    assert len(reading.prepared) == 2
    for prepared in reading.prepared:
        assert prepared.grid == expected.grid
        assert prepared.data.dtype == np.float32
        assert prepared.data.flags.writeable
        np.testing.assert_array_equal(prepared.data, expected.data)


def test_the_empty_image_is_warned_of_in_the_same_words_as_without_the_process() -> None:
    from trtbuild.runtime.predictor import EMPTY

    assert worker_main.EMPTY == EMPTY


def test_the_readers_error_keeps_its_class_and_its_message(plain: Worker, tmp_path: Path) -> None:
    bad = tmp_path / "bad_0000.nii.gz"
    bad.write_bytes(b"no image")
    for file in (bad, tmp_path / "none_0000.nii.gz"):
        with pytest.raises(InputError) as without:
            reader_named("SimpleITKIO").read_image((file,), ("T1",))
        with pytest.raises(InputError) as through:
            plain.submit(request("a", file)).result()
        assert type(through.value) is type(without.value)
        assert str(through.value) == str(without.value)
        assert through.value.where == str(file)


def write_slice(file: Path, plane: np.ndarray, z: int) -> None:
    """A CT slice (Y, X) of int16. Not by SimpleITK, whose DICOM writer leaves another locale behind."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.{z + 1}"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.5", "1.2.4", "1.2.6"
    data.Modality, data.InstanceNumber, data.ImageType = "CT", z, ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 3 * z], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness, data.RescaleSlope, data.RescaleIntercept = [1.5, 1.5], 3, 1, 0
    data.Rows, data.Columns = plane.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelData = plane.tobytes()
    data.save_as(file, enforce_file_format=True)


def test_the_folder_of_a_dicom_series_is_an_image(plain: Worker, tmp_path: Path) -> None:
    from trtbuild.volume.io.dicom_io import read_series

    values = np.random.default_rng(0).integers(0, 100, (6, 9, 8)).astype(np.int16)
    for z, plane in enumerate(values):
        write_slice(tmp_path / f"{z}.dcm", plane, z)
    spec = replace(PLAIN, spacing=(3.0, 1.5, 1.5))
    image = read_series((tmp_path,), spec.channels, spec.reader)
    np.testing.assert_array_equal(image.data[0], values)
    reading = plain.submit(request("series", tmp_path, specs=(spec,))).result()
    assert reading.image.geometry == image.geometry
    np.testing.assert_array_equal(reading.prepared[0].data, image.data)


def every_class(top: type[TrtbuildError] = TrtbuildError) -> Iterator[type[TrtbuildError]]:
    yield top
    for below in top.__subclasses__():
        yield from every_class(below)


@pytest.mark.parametrize(
    "kind", [c for c in every_class() if c.__module__ == errors.__name__], ids=lambda c: c.__name__
)
def test_every_class_of_errors_crosses_the_pipe(kind: type[TrtbuildError]) -> None:
    class Foreign:
        """Cannot be pickled."""

        def __str__(self) -> str:
            return "(3, 4)\nsecond line"

    error = (
        MissingExtra("pydicom", "dicom", "read DICOM")
        if kind is MissingExtra
        else kind("No.", expected=Foreign(), got=ValueError("x"), where=Path("/a/b"), hint="do it")
    )
    message = str(error)
    with_text = worker_main._plain(error)
    reader, writer = pipe()
    with reader, writer:
        send(writer, Failed(error=with_text))
        there = receive(reader).error  # type: ignore[attr-defined]
    assert type(there) is kind
    assert str(there) == message
    assert there.hint == error.hint
    assert there.exit_code == kind.exit_code


@pytest.mark.usefixtures("odd_reader")
def test_lack_of_memory_in_the_process_is_a_memory_error_here() -> None:
    with open_worker() as worker:
        error = worker.submit(request("memory")).exception()
        assert type(error) is MemoryError
        assert "Unable to allocate 4" in str(error)
        assert worker.submit(request("next")).result().prepared


@pytest.mark.usefixtures("odd_reader")
@pytest.mark.parametrize(("name", "words"), [("bug", "a mistake of ours"), ("foreign", "cannot be pickled")])
def test_a_bug_in_the_process_shows_its_traceback(name: str, words: str) -> None:
    with open_worker() as worker:
        future = worker.submit(request(name))
        with pytest.raises(RuntimeError, match=r"worker_readers\.py") as caught:
            future.result()
        assert words in str(caught.value)
        assert "Traceback" in str(caught.value)


@pytest.mark.usefixtures("odd_reader")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("segfault", ["image library crashed", "SIGSEGV while reading"]),
        ("abort", ["image library crashed", "SIGABRT while reading", "instance of 'itk::ExceptionObject'"]),
        ("killed", ["lack of memory", "SIGKILL while reading", "GB of memory are available now"]),
        ("exit", ["ended by itself", "exit code 3 while reading", "licence server not found"]),
    ],
)
def test_a_process_that_dies_fails_its_own_case_and_says_why(name: str, words: list[str]) -> None:
    with open_worker() as worker:
        before, dying, after = (worker.submit(request(case)) for case in ("before", name, "after"))
        assert before.result().prepared
        error = dying.exception()
        assert type(error) is WorkerDied
        for word in (*words, f"case {name}: /{name}"):
            assert word in str(error)
        assert len(str(error)) < 1000
        assert after.result().prepared


@pytest.mark.usefixtures("odd_reader")
def test_every_case_may_have_a_process_of_its_own() -> None:
    with open_worker() as worker:
        futures = [worker.submit(request("segfault")) for _ in range(4)]
        assert {type(future.exception()) for future in futures} == {WorkerDied}


def test_a_case_that_dies_while_it_is_prepared_is_told_apart_and_measured(plain: Worker, tmp_path: Path) -> None:
    spec, files = zoo_case("iso3d", "main", tmp_path)
    slow = replace(spec, spacing=(0.12,) * 3)  # more than 10^8 voxels
    future = plain.submit(request("big", files=files, specs=(slow,)))
    busy(plain, future)
    while plain._child is not None and plain._child.stage is not None and plain._child.stage.name == "reading":
        time.sleep(0.001)
    os.kill(busy(plain, future), signal.SIGKILL)
    error = future.exception()
    assert isinstance(error, WorkerDied)
    shape = reader_named(spec.reader).read_image(files, spec.channels).data.shape
    assert f"SIGKILL while preparing ({' x '.join(map(str, shape))} voxels, " in str(error)
    assert "MB for the network" in str(error)


def test_a_process_that_dies_while_it_is_idle_costs_no_case(plain: Worker, tmp_path: Path) -> None:
    spec, files = zoo_case("rgb_png", "main", tmp_path)
    ask = request("a", files=files, specs=(spec,))
    plain.submit(ask).result()
    (pid,) = plain.pids
    os.kill(pid, signal.SIGKILL)
    assert plain.submit(ask).result().prepared
    assert plain.pids[0] != pid


@pytest.mark.usefixtures("odd_reader")
def test_what_libraries_print_does_not_reach_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    with open_worker() as worker:
        for _ in range(2):
            assert worker.submit(request("noise")).result(20).prepared
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("odd_reader")
def test_closing_ends_the_case_under_way_and_cancels_the_others() -> None:
    started = time.monotonic()
    with open_worker() as worker:
        first, second, third = (worker.submit(request(case)) for case in ("sleep", "second", "third"))
        pid = busy(worker, first)
        assert second.cancel()
    assert time.monotonic() - started < 10
    assert state(pid) == ""
    assert isinstance(first.exception(), Cancelled)
    with pytest.raises(CancelledError):
        third.result(0)
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(request("late"))
    worker.close()


def test_an_idle_process_ends_with_the_block() -> None:
    with open_worker() as worker:
        worker.submit(request("none")).exception()
        (pid,) = worker.pids
        assert state(pid) in ("S", "R", "D")
    assert state(pid) == ""
    assert worker.pids == ()


@pytest.mark.usefixtures("odd_reader")
def test_a_cancelled_request_is_skipped() -> None:
    with open_worker() as worker:
        first, second, third = (worker.submit(request(case)) for case in ("pause", "segfault", "third"))
        pid = busy(worker, first)
        assert second.cancel()
        assert first.result().prepared
        assert third.result().prepared
        assert worker.pids[0] == pid


def test_a_relative_path_starts_at_the_folder_of_the_call(
    plain: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = {}
    for name in ("iso3d", "regions4"):
        folder = tmp_path / name
        folder.mkdir()
        spec, files = zoo_case("rgb_png", "main" if name == "iso3d" else "small", folder)
        (folder / files[0].name).rename(folder / "same_0000.png")
        monkeypatch.chdir(folder)
        readings[name] = plain.submit(request("a", Path("same_0000.png"), specs=(spec,)))
        monkeypatch.chdir(tmp_path)
    shapes = [future.result().image.data.shape for future in readings.values()]
    assert shapes[0] != shapes[1]
    missing = plain.submit(request("b", Path("same_0000.png"), specs=(spec,)))
    with pytest.raises(InputError, match="There is no such image file"):
        missing.result()


@pytest.mark.usefixtures("odd_reader")
def test_an_error_on_this_side_of_the_pipe_fails_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(pipe: io.FileIO) -> object:
        raise MemoryError("no room for the reply")

    with open_worker() as worker:
        worker.submit(request("first")).result()
        with monkeypatch.context() as patch:
            patch.setattr(child_module, "receive", no_memory)
            with pytest.raises(MemoryError, match="no room"):
                worker.submit(request("second")).result()
        assert worker.submit(request("third")).result().image.data.shape == (0, 4, 256, 256)


# --- the stages of a cascade


def cascade(tmp_path: Path) -> tuple[ModelSpec, ModelSpec, tuple[Path, ...]]:
    """First and second stage, and the image of a case."""
    spec, files = zoo_case("iso3d", "main", tmp_path)
    first = replace(spec, configuration="3d_lowres", spacing=tuple(2 * s for s in spec.spacing))
    return first, replace(spec, previous_stage="3d_lowres"), files


def labels_for(files: tuple[Path, ...], spec: ModelSpec, seed: int) -> tuple[Image, np.ndarray]:
    """The image, and random labels on its grid."""
    image = reader_named(spec.reader).read_image(files, spec.channels)
    values = np.array([0, *spec.labels.foreground], np.uint8)
    return image, np.random.default_rng(seed).choice(values, image.data.shape[1:])


def same(prepared: Prepared, image: Image, spec: ModelSpec, labels: np.ndarray) -> bool:
    with threadpool_limits(1, user_api="blas"):
        expected = prepared_from_array(image.data, image.spacing, spec, labels)
    return prepared.grid == expected.grid and np.array_equal(prepared.data, expected.data)


def test_a_kept_case_is_prepared_for_the_second_stage(plain: Worker, tmp_path: Path) -> None:
    first, second, files = cascade(tmp_path)
    plain.submit(request("case", files=files, specs=(first,), keep=True)).result()
    given = [labels_for(files, second, seed) for seed in (1, 2)]
    for file in files:
        file.unlink()  # what is kept is not read again
    assert isinstance(plain.submit(request("other", files=files, specs=(first,))).exception(), InputError)
    for image, labels in given:
        assert same(plain.second("case", second, labels).result(), image, second, labels)
    wrong = plain.second("case", second, labels[1:])
    assert isinstance(wrong.exception(), InputError)
    plain.forget("case")
    plain.forget("case")
    with pytest.raises(KeyError):
        plain.second("case", second, labels)


def test_a_kept_case_survives_the_death_of_its_process(plain: Worker, tmp_path: Path) -> None:
    first, second, files = cascade(tmp_path)
    plain.submit(request("case", files=files, specs=(first,), keep=True)).result()
    os.kill(plain.pids[0], signal.SIGKILL)
    image, labels = labels_for(files, second, 3)
    assert same(plain.second("case", second, labels).result(), image, second, labels)
    plain.forget("case")


def test_the_labels_of_an_earlier_stage_may_come_from_a_file(plain: Worker, tmp_path: Path) -> None:
    first, second, files = cascade(tmp_path)
    image, labels = labels_for(files, second, 4)
    reader = reader_named(second.reader)
    reader.write_segmentation(labels, image.geometry, tmp_path / "case.nii.gz")
    ask = request("case", files=files, specs=(first, second), previous=tmp_path / "case.nii.gz")
    prepared = plain.submit(ask).result().prepared
    assert prepared[0].data.shape[0] == len(first.channels)
    assert same(prepared[1], image, second, labels)
    missing = plain.submit(replace(ask, previous=tmp_path / "none.nii.gz")).exception()
    assert isinstance(missing, InputError)
    assert "none.nii.gz" in str(missing)


def test_labels_of_an_earlier_stage_that_lie_elsewhere_fail_the_case(plain: Worker, tmp_path: Path) -> None:
    first, second, files = cascade(tmp_path)
    image, labels = labels_for(files, second, 4)
    assert isinstance(image.geometry, ItkGeometry)
    moved = replace(image.geometry, origin=(500.0, 500.0, 500.0))
    reader_named(second.reader).write_segmentation(labels, moved, tmp_path / "case.nii.gz")
    ask = request("case", files=files, specs=(first, second), previous=tmp_path / "case.nii.gz")
    error = plain.submit(ask).exception()
    assert isinstance(error, InputError)
    assert "another origin" in str(error)
    assert "case.nii.gz" in str(error)


@LINUX
@pytest.mark.usefixtures("odd_reader")
def test_a_kept_image_takes_memory_until_it_is_forgotten() -> None:
    size = 400 * 256 * 256 * 4
    with open_worker([PLAIN]) as worker:
        worker.submit(request("4")).result()
        (pid,) = worker.pids
        before = resident(pid)
        worker.submit(request("400", keep=True)).result()
        worker.submit(request("4")).result()
        assert size * 0.95 < resident(pid) - before < size * 1.1
        worker.forget("400")
        worker.submit(request("4")).result()
        assert resident(pid) < before + 0.05 * size


def test_models_with_different_readers_are_refused() -> None:
    with pytest.raises(ValueError, match="one reader"):
        request("a", specs=(PLAIN, replace(PLAIN, reader="NibabelIO")))
    with pytest.raises(ValueError, match="one reader"):
        request("a", specs=())


# --- memory and speed


def pipe() -> tuple[io.FileIO, io.FileIO]:
    reader, writer = os.pipe()
    return io.FileIO(reader, "rb"), io.FileIO(writer, "wb")


def test_arrays_cross_the_pipe_without_a_second_copy() -> None:
    array = np.arange(10_000_000, dtype=np.float32).reshape(2, 5, 1000, 1000)
    there: list[Done] = []
    reader, writer = pipe()
    with reader, writer:
        thread = threading.Thread(target=lambda: there.append(receive(reader)))  # type: ignore[arg-type]
        thread.start()
        tracemalloc.start()
        send(writer, Done(value={"a": array, "fortran": array[0, 0].T, "empty": array[:0]}))
        thread.join()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    value: Any = there[0].value
    np.testing.assert_array_equal(value["a"], array)
    np.testing.assert_array_equal(value["fortran"], array[0, 0].T)
    assert value["empty"].shape == (0, 5, 1000, 1000)
    assert peak < 1.12 * array.nbytes  # what arrives (1.1), and nothing on the sender's side


@pytest.mark.usefixtures("odd_reader")
def test_a_reply_of_200_mb_comes_quickly(record_property: Callable[[str, object], None]) -> None:
    """At 1 to 3 GB/s where nothing else runs; a busy machine is given ten times as long."""
    with open_worker() as worker:
        worker.submit(request("4")).result()
        started = time.perf_counter()
        reading = worker.submit(request("800")).result()
        seconds = time.perf_counter() - started - sum(reading.seconds.values())
    rate = reading.prepared[0].data.nbytes / seconds / 1e6
    record_property("megabytes_per_second", round(rate))
    assert rate > 100


def resident(pid: int, key: str = "VmRSS") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@LINUX
@pytest.mark.usefixtures("odd_reader")
def test_the_memory_of_a_case_goes_back_to_the_system() -> None:
    size = 400 * 256 * 256 * 4  # of an image: 105 MB
    with open_worker([PLAIN]) as worker:
        worker.submit(request("4")).result()
        before = resident(worker.pids[0])
        peaks = []
        for case in ("400", "400", "400", "4"):
            worker.submit(request(case)).result()
            peaks.append(resident(worker.pids[0], "VmHWM"))
        after = resident(worker.pids[0])
    assert after < before + 0.05 * size
    # raw image, normalised channel, prepared image, the masks of the crop (0.25); nothing of the case before
    assert max(peaks) - before < 3.5 * size
    assert peaks[2] < peaks[0] + 0.05 * size


@pytest.mark.usefixtures("odd_reader")
def test_the_worker_holds_no_reading_once_it_is_handed_over() -> None:
    with open_worker() as worker:
        future = worker.submit(request("4"))
        reading = weakref.ref(future.result())
        del future
        end = time.monotonic() + 10
        while reading() is not None and time.monotonic() < end:  # the thread may still be on its way
            time.sleep(0.01)
            gc.collect()
        assert reading() is None


# --- the process and its surroundings


@LINUX
@pytest.mark.usefixtures("odd_reader")
def test_the_system_ends_the_process_before_the_run_where_memory_is_short() -> None:
    def score(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    before = score("self")
    with open_worker() as worker:
        worker.submit(request("4")).result()
        assert score(worker.pids[0]) == 1000
    assert score("self") == before


@pytest.mark.usefixtures("odd_reader")
def test_a_worker_outlives_the_thread_that_opened_it() -> None:
    opened: list[object] = []
    context = open_worker()
    thread = threading.Thread(target=lambda: opened.append(context.__enter__()))
    thread.start()
    thread.join()
    worker = opened[0]
    assert isinstance(worker, Worker)
    try:
        worker.submit(request("4")).result()
        (pid,) = worker.pids
        time.sleep(0.2)
        worker.submit(request("4")).result()
        assert worker.pids[0] == pid
    finally:
        context.__exit__(None, None, None)


SCRIPT = """
from pathlib import Path
from specs import make_spec
from trtbuild.steps.folder_run.worker import Request, open_worker

def ask(name):
    return Request(case=name, files=(Path("/") / name,), specs=(make_spec(),))

print("top of the script", flush=True)
with open_worker() as worker:
    {body}
"""


def script(body: str) -> str:
    """A user's script: no `if __name__ == "__main__"`."""
    return SCRIPT.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip())


BUSY = """
while not worker.pids: pass
future = worker.submit(ask("hold"))
while worker._child is None or worker._child.stage is None: pass
print(worker.pids[0], flush=True)
future.result()
"""


@LINUX
@pytest.mark.usefixtures("odd_reader")
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_is_left_when_the_run_is_killed(way: signal.Signals) -> None:
    """Even where a library holds Python's lock."""
    with subprocess.Popen(
        [sys.executable, "-c", script(BUSY)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline().strip() == "top of the script"
        pid = int(run.stdout.readline())
        assert state(pid) not in ("", "Z")
        run.send_signal(way)
        run.communicate(timeout=20)
        assert gone(pid)


@LINUX
@pytest.mark.usefixtures("odd_reader")
def test_ctrl_c_in_the_terminal_is_for_the_run_alone() -> None:
    body = """
    import os, signal
    worker.submit(ask("4")).result()
    (pid,) = worker.pids
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    print("ready", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        worker.submit(ask("5")).result()
        print("same process:", pid == worker.pids[0])
    """
    with subprocess.Popen(
        [sys.executable, "-c", script(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        assert [run.stdout.readline().strip() for _ in range(2)] == ["top of the script", "ready"]
        time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=20)
    assert out.strip() == "same process: True", err


@pytest.mark.usefixtures("odd_reader")
@pytest.mark.parametrize("way", ["file", "stdin", "-P"])
def test_it_works_in_a_script_without_a_main_guard(way: str, tmp_path: Path) -> None:
    """From a file, from stdin as in notebooks, and without the script's folder in the search path."""
    if way == "-P" and sys.version_info < (3, 11):
        pytest.skip("python -P is of 3.11")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    # what lies in the working folder must not be imported: neither for the run nor for its process
    for module in ("numpy", "ctypes", "threadpoolctl"):
        (folder / f"{module}.py").write_text("raise SystemExit('the wrong module')")
    text = script("print(worker.submit(ask('7')).result().image.data.shape)")
    file = tmp_path / "user_script.py"
    file.write_text(text)
    if way == "stdin":
        text = "import sys; sys.path = [p for p in sys.path if p]\n" + text
    command = {"file": [str(file)], "stdin": ["-"], "-P": ["-P", str(file)]}[way]
    result = subprocess.run(
        [sys.executable, *command],
        input=text if way == "stdin" else None,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.splitlines() == ["top of the script", "(0, 7, 256, 256)"], result.stderr


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs an interpreter without trtbuild: that of the venv")
def test_it_finds_trtbuild_where_only_the_script_has_made_it_findable(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(9)")  # `-I` refuses it for the process, too
    places = [str(Path(np.__file__).parents[1]), str(worker_readers.TESTS), str(worker_readers.TESTS.parent)]
    text = f"import sys; sys.path += {places}\n"
    text += script("print(type(worker.submit(ask('none')).exception()).__name__)")
    result = subprocess.run(
        [sys._base_executable, "-I", "-c", text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout.splitlines() == ["top of the script", "InputError"], result.stderr


@pytest.mark.parametrize("executable", [None, ""])
def test_a_program_without_an_interpreter_is_refused(executable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(TrtbuildError, match=r"sys\.executable"), open_worker():
        pass


def test_a_frozen_program_is_refused_since_it_would_start_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(TrtbuildError, match="frozen"), open_worker():
        pass


def test_an_interpreter_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/none/python")
    with open_worker() as worker:
        error = worker.submit(request("a")).exception()
    assert isinstance(error, WorkerDied)
    assert "/none/python" in str(error)


def test_an_interpreter_that_does_not_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with open_worker() as worker:
        error = worker.submit(request("a")).exception()
    assert isinstance(error, WorkerDied)
    assert "exit code 1 before it began to read" in str(error)


@pytest.mark.usefixtures("odd_reader")
def test_warming_imports_what_a_case_needs_and_an_error_of_it_ends_nothing(tmp_path: Path) -> None:
    slices, _ = zoo_case("slices2d", "main", tmp_path)
    spec, _ = zoo_case("ct_aniso", "main", tmp_path)
    broken = replace(PLAIN, resample_data=replace(PLAIN.resample_data, order=77))
    with open_worker([slices, spec]) as worker:
        assert worker.warm([slices, spec]).result() is None
        loaded = Path(f"/proc/{worker.pids[0]}/maps").read_text() if sys.platform == "linux" else "scipy/ndimage"
        assert "scipy/ndimage" in loaded
        assert worker.warm([broken]).exception() is not None
        assert worker.submit(request("4")).result().prepared
