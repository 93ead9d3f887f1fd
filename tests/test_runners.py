"""One contract for every runner: null, ONNX Runtime, OpenVINO in f32 and (where the CPU has it) in bf16, TensorRT.

TensorRT runs on a fake GPU (tests/fake_cuda.py), which tells what would go wrong in silence on a real one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_nvinfer import device_record, install, plan_of, write_plan
from runner_samples import (
    CHANNELS,
    HEADS,
    PATCHES,
    make_record,
    patches,
    reference_logits,
    small_unet,
    with_profile,
    write_model,
)

import trtbuild.runtime.fit
from trtbuild.errors import EngineError, NonFinite
from trtbuild.runtime.null import null_logits
from trtbuild.runtime.openvino import openvino_module
from trtbuild.runtime.runner import Batch, Runner
from trtbuild.runtime.select import open_runner
from trtbuild.spec import BuildRecord


@dataclass(frozen=True)
class Subject:
    """One way to run the small network. `tolerance` is relative to the largest logit."""

    backend: str
    precision: str
    tolerance: float

    def __str__(self) -> str:
        return f"{self.backend}-{self.precision}"


# The largest error over 30 seeds was 5e-7 in float32 and 6e-3 in bfloat16 (2^-9 per rounding, four layers); other CPUs
# sum in other orders, hence the margin.
NULL = Subject("null", "f32", 1e-6)
REAL = [Subject("onnxruntime", "f32", 3e-6), Subject("openvino", "f32", 3e-6)]
if "BF16" in openvino_module().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    REAL.append(Subject("openvino", "bf16", 2e-2))

GPU = [Subject("tensorrt", "f32", 3e-6), Subject("tensorrt-rtx", "f32", 3e-6)]

every = pytest.mark.parametrize("subject", [NULL, *REAL, *GPU], ids=str)
cpu = pytest.mark.parametrize("subject", [NULL, *REAL], ids=str)
real = pytest.mark.parametrize("subject", REAL, ids=str)
both = pytest.mark.parametrize("dimensions", [2, 3])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {n: write_model(folder / f"small_{n}d.onnx", small_unet(n)) for n in (2, 3)}


Open = Callable[..., Runner]


@pytest.fixture
def start(models: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens runners of the small network and closes them after the test; a fake GPU must then be as it was."""
    opened: list[Runner] = []
    gpus: list[Any] = []

    def start(
        subject: Subject, dimensions: int = 3, threads: int | None = None, recorded: int = 2, **options: Any
    ) -> Runner:
        if subject in GPU:
            if not gpus:
                monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / "cache"))
                gpus.append(install(monkeypatch, subject.backend))
            batches = (1, options.get("batch", 2), options.get("batch", 2))
            plan = plan_of(dimensions, batches)
            record = device_record(subject.backend, plan, dimensions=dimensions, batches=batches)
            engine = write_plan(tmp_path / f"{len(opened)}.engine", plan)
        else:
            record = make_record(subject.backend, dimensions, subject.precision, threads=recorded, **options)
            engine = models[dimensions]
        opened.append(open_runner(record, engine, threads=threads))
        return opened[-1]

    yield start
    for runner in opened:
        runner.close()
    for gpu in gpus:
        assert gpu.cuda.faults == []
        assert gpu.cuda.leaks() == []


def expected(subject: Subject, batch: Batch) -> Any:
    return null_logits(batch, HEADS) if subject is NULL else reference_logits(batch)


def assert_right(subject: Subject, logits: Batch, batch: Batch) -> None:
    want = expected(subject, batch)
    assert logits.shape == want.shape
    assert logits.dtype == np.float32
    assert np.abs(logits - want).max() <= subject.tolerance * np.abs(want).max()


# --- what it computes


@both
@every
def test_logits_are_those_of_the_reference(subject: Subject, dimensions: int, start: Open) -> None:
    batch = patches(2, dimensions)
    assert_right(subject, start(subject, dimensions).infer(batch), batch)


@pytest.mark.parametrize("subject", [s for s in REAL if s.precision == "bf16"], ids=str)
def test_bf16_is_not_silently_f32(subject: Subject, start: Open) -> None:
    batch = patches(2, 3)
    error = np.abs(start(subject).infer(batch) - reference_logits(batch)).max()
    assert error > 1e-4 * np.abs(reference_logits(batch)).max()


@both
@every
def test_any_number_of_patches_is_right_whatever_the_engines_batch(
    subject: Subject, dimensions: int, start: Open
) -> None:
    runner = start(subject, dimensions, batch=2)
    for count in (1, 2, 3, 5, 4, 1):
        batch = patches(count, dimensions, seed=count)
        assert_right(subject, runner.infer(batch), batch)


@every
def test_a_patch_has_the_same_bits_alone_and_in_company(subject: Subject, start: Open) -> None:
    runner = start(subject, batch=2)
    batch = patches(3, 3)
    together = runner.infer(batch).copy()
    for one, logits in zip(batch, together, strict=True):
        assert np.array_equal(runner.infer(one[None])[0], logits)
    assert np.array_equal(runner.infer(batch), together)


def _strided(batch: Batch) -> dict[str, Batch]:
    wide = np.zeros((*batch.shape[:-1], 2 * batch.shape[-1]), dtype=np.float32)
    wide[..., ::2] = batch
    raw = np.zeros(batch.nbytes + 1, dtype=np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(batch.shape)
    unaligned[...] = batch
    frozen = batch.copy()
    frozen.flags.writeable = False
    mirrored = np.ascontiguousarray(np.flip(batch, axis=(2, 3)))
    return {
        "mirrored": np.flip(mirrored, axis=(2, 3)),
        "fortran": np.asfortranarray(batch),
        "every other": wide[..., ::2],
        "unaligned": unaligned,
        "read-only": frozen,
        "channels last": np.moveaxis(np.ascontiguousarray(np.moveaxis(batch, 1, -1)), -1, 1),
        "broadcast": np.broadcast_to(batch[:1], batch.shape),
    }


@every
def test_strides_alignment_and_ownership_of_the_input_do_not_matter(subject: Subject, start: Open) -> None:
    runner = start(subject)
    batch = patches(2, 3)
    for name, view in _strided(batch).items():
        plain = np.array(view, order="C")
        want = runner.infer(plain).copy()
        assert np.array_equal(runner.infer(view), want), name
        assert np.array_equal(next(runner.stream([view])), want), name
        assert np.array_equal(view, plain), f"{name}: the input was changed"


@every
def test_repeated_runs_and_reopened_engines_give_the_same_bytes(subject: Subject, start: Open) -> None:
    batch = patches(5, 3)
    runner = start(subject, streams=2)
    first = runner.infer(batch).tobytes()
    assert all(runner.infer(batch).tobytes() == first for _ in range(5))
    streamed = b"".join(logits.tobytes() for logits in start(subject, streams=2).stream([batch, batch]))
    assert streamed == first + first


# --- what it refuses


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, CHANNELS + 1, *PATCHES[3]), np.float32),
        ((2, CHANNELS, 8, 6, 11), np.float32),
        ((CHANNELS, *PATCHES[3]), np.float32),
        ((0, CHANNELS, *PATCHES[3]), np.float32),
        ((2, CHANNELS, *PATCHES[3]), np.float64),
        ((2, CHANNELS, *PATCHES[3]), np.float16),
        ((2, CHANNELS, *PATCHES[3]), ">f4"),
    ],
)
@every
def test_a_wrong_shape_or_type_is_told_with_what_was_expected(
    subject: Subject, shape: tuple[int, ...], dtype: Any, start: Open
) -> None:
    runner = start(subject)
    for call in (runner.infer, lambda batch: list(runner.stream([batch]))):
        with pytest.raises(EngineError) as caught:
            call(np.zeros(shape, dtype=dtype))
        assert "8, 6, 10" in str(caught.value.expected)
        assert str(caught.value.got) in (str(shape), str(np.dtype(dtype)))
    batch = patches(2, 3)
    assert_right(subject, runner.infer(batch), batch)


@every
def test_a_list_is_no_batch(subject: Subject, start: Open) -> None:
    with pytest.raises(EngineError, match="list"):
        start(subject).infer(patches(1, 3).tolist())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@every
def test_nan_and_infinity_are_refused_and_not_swallowed(subject: Subject, value: float, start: Open) -> None:
    runner = start(subject)
    batch = patches(2, 3)
    batch[1, 1, 3, 3, 3] = value
    with pytest.raises(NonFinite):
        runner.infer(batch)
    with pytest.raises(NonFinite):
        list(runner.stream([patches(2, 3), batch]))


# --- streaming


def _jittered(batches: list[Batch], seed: int) -> Iterator[Batch]:
    """Batches at uneven times, all in one buffer that the producer uses again."""
    rng = random.Random(seed)
    buffer = np.empty_like(batches[0])
    for batch in batches:
        time.sleep(rng.choice((0, 0, 0.004)))
        buffer[...] = batch
        yield buffer
        buffer[...] = 1e9


@pytest.mark.parametrize("streams", [1, 2])
@every
def test_stream_keeps_the_order_and_takes_copies(subject: Subject, streams: int, start: Open) -> None:
    runner = start(subject, streams=streams, batch=1)
    batches = [patches(1, 3, seed=n) for n in range(20)]
    rng = random.Random(1)
    count = 0
    for batch, logits in zip(batches, runner.stream(_jittered(batches, seed=2)), strict=True):
        time.sleep(rng.choice((0, 0, 0.004)))
        assert_right(subject, logits, batch)
        count += 1
    assert count == 20


@every
def test_stream_takes_batches_of_changing_size(subject: Subject, start: Open) -> None:
    runner = start(subject, streams=2, batch=2)
    batches = [patches(count, 3, seed=count) for count in (2, 1, 5, 2, 3, 1)]
    for batch, logits in zip(batches, runner.stream(batches), strict=True):
        assert_right(subject, logits, batch)


@every
def test_an_empty_stream_ends(subject: Subject, start: Open) -> None:
    assert list(start(subject).stream([])) == []


@pytest.mark.parametrize("streams", [1, 2])
@every
def test_stream_takes_no_more_than_parallel_plus_one_ahead(subject: Subject, streams: int, start: Open) -> None:
    runner = start(subject, streams=streams)
    taken = 0

    def producer() -> Iterator[Batch]:
        nonlocal taken
        for n in range(10):
            taken += 1
            yield patches(2, 3, seed=n)

    for given, _ in enumerate(runner.stream(producer())):
        assert taken - given <= runner.describe().parallel + 1


@every
def test_a_result_holds_while_the_next_ones_are_computed(subject: Subject, start: Open) -> None:
    runner = start(subject, streams=2)
    batches = [patches(2, 3, seed=n) for n in range(8)]
    for batch, logits in zip(batches, runner.stream(batches), strict=True):
        before = logits.copy()
        time.sleep(0.005)  # the lanes behind are at work
        assert np.array_equal(logits, before)
        assert_right(subject, logits, batch)


@every
def test_stopping_early_leaves_a_working_runner(subject: Subject, start: Open) -> None:
    runner = start(subject, streams=2)
    batch = patches(2, 3)
    for stop_after in (0, 1, 3):
        stream = runner.stream(iter([batch] * 10))
        for _ in range(stop_after):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert_right(subject, runner.infer(batch), batch)


class _Broken(RuntimeError):
    """Not ours: must come through as it is."""


@pytest.mark.parametrize("after", [0, 1, 2, 5])
@every
def test_an_error_of_the_producer_comes_through_unchanged(subject: Subject, after: int, start: Open) -> None:
    runner = start(subject, streams=2)
    error = _Broken("disk")
    batch = patches(2, 3)

    def producer() -> Iterator[Batch]:
        yield from [batch] * after
        raise error

    with pytest.raises(_Broken) as caught:
        list(runner.stream(producer()))
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert_right(subject, runner.infer(batch), batch)


# --- threads


@every
def test_parallel_threads_get_their_own_answers_and_buffers(subject: Subject, start: Open) -> None:
    runner = start(subject, streams=2, batch=1)
    inputs = [patches(1, 3, seed=n) for n in range(4)]
    answers = [runner.infer(batch).copy() for batch in inputs]
    together = threading.Barrier(4)

    def work(number: int) -> bool:
        for _ in range(10):
            together.wait(timeout=30)
            logits = runner.infer(inputs[number])
            together.wait(timeout=30)  # all four results are alive now
            if not np.array_equal(logits, answers[number]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@cpu
def test_fewer_cpus_than_recorded_are_used_and_told(
    subject: Subject, start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trtbuild.runtime.fit, "usable_cpus", lambda: 2)
    runner = start(subject, recorded=8, streams=8, batch=1)
    info = runner.describe()
    assert (info.parallel, info.details["threads"], info.details["streams"]) == (2, "2", "2")
    assert "recorded 8" in info.details["note.threads"]
    assert "2 CPUs" in info.details["note.threads"]
    batch = patches(1, 3)
    assert_right(subject, runner.infer(batch), batch)


@cpu
def test_the_users_threads_win_over_the_records(subject: Subject, start: Open) -> None:
    details = start(subject, 3, 1).describe().details
    assert details["threads"] == "1"
    assert details["note.threads"] == "1, recorded 2: as asked"


# --- describing and closing


@both
@every
def test_describe_says_what_was_opened(subject: Subject, dimensions: int, start: Open) -> None:
    info = start(subject, dimensions).describe()
    assert info.backend == subject.backend
    assert info.inference_precision == subject.precision
    assert info.inputs.shape == ("batch", CHANNELS, *PATCHES[dimensions])
    assert info.outputs.shape == ("batch", HEADS, *PATCHES[dimensions])
    assert (info.inputs.dtype, info.outputs.dtype) == ("float32", "float32")
    assert (info.inputs.name, info.outputs.name) == ("input", "logits")
    assert (info.parallel, info.batch) == (1, 2)
    assert info.version
    assert info.device
    assert subject in GPU or "note.version" in info.details  # the record says 0


@cpu
def test_a_record_of_this_machine_has_no_notes(subject: Subject, models: dict[int, Path], start: Open) -> None:
    info = start(subject).describe()
    record = replace(
        make_record(subject.backend, 3, subject.precision), version=info.version, device={"model": info.device}
    )
    with open_runner(record, models[3]) as runner:
        assert not [key for key in runner.describe().details if key.startswith("note.")]
    with open_runner(replace(record, device={"model": "8086"}), models[3]) as runner:
        assert "8086" in runner.describe().details["note.model"]


@every
def test_closing_twice_is_allowed_and_use_after_it_is_an_error(subject: Subject, start: Open) -> None:
    runner = start(subject)
    batch = patches(2, 3)
    held = runner.infer(batch)
    stream = runner.stream(iter([batch] * 9))
    next(stream)
    runner.close()
    runner.close()
    for call in (lambda: runner.infer(batch), lambda: runner.stream([batch]), runner.describe, lambda: next(stream)):
        with pytest.raises(EngineError, match="closed"):
            call()
    assert_right(subject, held, batch)


@every
def test_with_closes_even_when_the_body_fails(subject: Subject, start: Open) -> None:
    runner = start(subject)
    with pytest.raises(_Broken), runner:
        raise _Broken
    with pytest.raises(EngineError, match="closed"):
        runner.describe()


# --- opening badly


@pytest.mark.parametrize("content", [None, b"", b"\x00\x01nonsense" * 50, b"<html>404</html>", "truncated"])
@real
def test_a_missing_or_corrupt_file_is_an_engine_error_that_names_it(
    subject: Subject, content: Any, models: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(models[3].read_bytes()[:1500] if content == "truncated" else content)
    with pytest.raises(EngineError, match=r"bad\.onnx"):
        open_runner(make_record(subject.backend, 3, subject.precision), path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@real
def test_a_folder_is_no_engine(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="missing"):
        open_runner(make_record(subject.backend, 3, subject.precision), tmp_path)


@pytest.mark.parametrize("shape", [(2, CHANNELS + 1, 8, 6, 10), (2, CHANNELS, 8, 6, 12), (2, CHANNELS, 8, 6)])
@real
def test_a_network_of_another_shape_than_the_record_is_refused(
    subject: Subject, shape: tuple[int, ...], models: dict[int, Path]
) -> None:
    record = with_profile(make_record(subject.backend, 3, subject.precision), shape)
    with pytest.raises(EngineError, match="input shape") as caught:
        open_runner(record, models[3])
    assert caught.value.expected == ("batch", *shape[1:])


@real
def test_a_network_with_a_fixed_batch_of_one_runs_patch_by_patch_only(subject: Subject, tmp_path: Path) -> None:
    path = write_model(tmp_path / "fixed.onnx", small_unet(3, batch=1))
    batch = patches(3, 3)
    with open_runner(make_record(subject.backend, 3, subject.precision, batch=1), path) as runner:
        assert_right(subject, runner.infer(batch), batch)
    with pytest.raises(EngineError, match="input shape"):
        open_runner(make_record(subject.backend, 3, subject.precision, batch=2), path)


@pytest.mark.parametrize("key", ["threads", "streams", "batch"])
@pytest.mark.parametrize("value", [None, 0, -1, True, "2", 1.0])
@cpu
def test_a_wrong_option_is_named(subject: Subject, key: str, value: Any, models: dict[int, Path]) -> None:
    record: BuildRecord = make_record(subject.backend, 3, subject.precision, **{key: value})
    with pytest.raises(EngineError, match=rf"options\.{key}"):
        open_runner(record, models[3])


@cpu
def test_a_batch_beside_the_profile_is_refused(subject: Subject, models: dict[int, Path]) -> None:
    record = with_profile(make_record(subject.backend, 3, subject.precision), (4, CHANNELS, *PATCHES[3]))
    with pytest.raises(EngineError, match=r"options\.batch"):
        open_runner(record, models[3])


@every
def test_no_threads_at_all_are_refused(subject: Subject, start: Open) -> None:
    with pytest.raises(EngineError, match="threads"):
        start(subject, threads=0)
