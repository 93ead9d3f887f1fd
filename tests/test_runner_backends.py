"""What is particular to one backend, to the choice between them, and to the lanes below all of them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from runner_samples import (
    CHANNELS,
    HEADS,
    PATCHES,
    make_record,
    model_from_nodes,
    patches,
    small_unet,
    write_model,
)

import trtbuild.runtime.onnxruntime as ort_runner
import trtbuild.runtime.openvino as ov_runner
from trtbuild.errors import EngineError, MissingExtra, NonFinite, OutOfMemory, PrecisionMismatch
from trtbuild.machine import cpu_description
from trtbuild.runtime.lanes import LaneRunner
from trtbuild.runtime.null import NullRunner, null_info, null_logits
from trtbuild.runtime.runner import Batch, engine_errors
from trtbuild.runtime.select import available_backends, choose_backend, open_runner

ROOT = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small.onnx", small_unet(3))


def python(code: str, tmp_path: Path, *arguments: str) -> str:
    """Output of a fresh interpreter that sees the test helpers and has an empty home."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=120,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --- null runner


def test_null_argmax_is_the_nearest_whole_number_and_ties_take_the_lower() -> None:
    means = np.array([-3.0, 0.4, 0.5, 0.6, 1.5, 1.7, 9.0], dtype=np.float32).reshape(1, 1, 7, 1)
    assert null_logits(np.concatenate([means - 1, means + 1], axis=1), 3).argmax(axis=1).ravel().tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_null_regions_are_thresholds_at_half_the_head() -> None:
    means = np.array([0.4, 0.6, 1.1], dtype=np.float32).reshape(1, 1, 3, 1)
    assert (null_logits(means, 3) > 0)[0, :, :, 0].tolist() == [[False] * 3, [False, True, True], [False, False, True]]


def test_null_counts_calls_and_patches_and_overwrites_its_buffer() -> None:
    with NullRunner(null_info(make_record("null"))) as runner:
        first = runner.infer(patches(2, 3, seed=1))
        kept = first.copy()
        second = runner.infer(patches(2, 3, seed=2))
        list(runner.stream([patches(1, 3)] * 3))
        assert (runner.calls, runner.patches) == (5, 7)
        assert np.shares_memory(first, second)
        assert not np.array_equal(first, kept)


class _FailsOnThird(NullRunner):
    def answer(self, batch: Batch) -> Batch:
        if self.calls == 2:
            self.calls += 1
            raise EngineError("Injected.")
        return super().answer(batch)


def test_a_failed_call_is_told_and_the_runner_works_on() -> None:
    runner = _FailsOnThird(null_info(make_record("null", streams=2)))
    batch = patches(2, 3)
    with pytest.raises(EngineError, match="Injected"):
        list(runner.stream([batch] * 6))
    assert np.array_equal(runner.infer(batch), null_logits(batch, HEADS))


# --- lanes


class _SlowLane:
    """Answers from a thread, late; remembers whether it was ever left while at work."""

    def __init__(self, log: list[str], number: int, fail_at: int | None) -> None:
        self.log, self.number, self.fail_at = log, number, fail_at
        self.thread: threading.Thread | None = None
        self.go = threading.Event()

    def start(self, batch: Batch) -> None:
        self.batch = batch
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        self.go.wait(0.02)
        self.log.append(f"done {int(self.batch.flat[0])}")

    def wait(self) -> Batch:
        self.settle()
        if int(self.batch.flat[0]) == self.fail_at:
            raise EngineError("lane")
        return self.batch

    def settle(self) -> None:
        assert self.thread is not None
        self.thread.join()


def _slow_runner(fail_at: int | None = None) -> tuple[LaneRunner, list[str]]:
    log: list[str] = []
    info = null_info(make_record("null", streams=2))
    runner = LaneRunner(info, lambda background: _SlowLane(log, 0, fail_at), lambda: log.append("released"))
    return runner, log


def _numbered(count: int, error: Exception | None = None) -> Iterator[Batch]:
    for n in range(count):
        yield np.full((2, CHANNELS, *PATCHES[3]), n, dtype=np.float32)
    if error is not None:
        raise error


@pytest.mark.parametrize("how", ["stop", "producer", "lane", "bad batch"])
def test_work_under_way_is_waited_for_whatever_ends_the_stream(how: str) -> None:
    runner, log = _slow_runner(fail_at=0 if how == "lane" else None)
    if how == "stop":
        stream = runner.stream(_numbered(9))
        assert int(next(stream).flat[0]) == 0
        stream.close()  # type: ignore[attr-defined]
    elif how == "producer":
        with pytest.raises(OSError, match="disk"):
            list(runner.stream(_numbered(2, OSError("disk"))))
    elif how == "lane":
        with pytest.raises(EngineError, match="lane"):
            list(runner.stream(_numbered(9)))
    else:
        with pytest.raises(NonFinite):
            list(runner.stream([*_numbered(2), np.full((2, CHANNELS, *PATCHES[3]), np.nan, dtype=np.float32)]))
    runner.close()
    started = 2 if how in ("producer", "bad batch") else 3
    assert sorted(log[:-1]) == [f"done {n}" for n in range(started)]
    assert log[-1] == "released"


def test_a_lane_that_failed_is_not_used_again() -> None:
    lanes: list[_SlowLane] = []

    def open_lane(background: bool) -> _SlowLane:
        lanes.append(_SlowLane([], len(lanes), fail_at=0))
        return lanes[-1]

    runner = LaneRunner(null_info(make_record("null")), open_lane, lambda: None)
    zero, one = _numbered(2)
    with pytest.raises(EngineError, match="lane"):
        runner.infer(zero)
    runner.infer(one)
    runner.infer(one)
    assert len(lanes) == 2


# --- openvino


def test_openvino_refuses_bf16_on_a_cpu_without_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov_runner, "PRECISIONS", {**ov_runner.PRECISIONS, "bf16": ("NO_SUCH_UNIT", "PERFORMANCE")})
    with pytest.raises(EngineError, match="bf16") as caught:
        open_runner(make_record("openvino", precision="bf16"), model)
    assert caught.value.expected == "f32"


def test_openvino_refuses_a_precision_it_cannot_pin(model: Path) -> None:
    with pytest.raises(EngineError, match="f16"):
        open_runner(make_record("openvino", precision="f16"), model)


@pytest.mark.parametrize("layers", ["as executed", "as asked"])
@pytest.mark.skipif("bf16" not in cpu_description()["isa"], reason="another precision than f32 is needed")
def test_openvino_that_takes_another_precision_than_was_set_is_a_mismatch(
    layers: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ov_runner._config
    monkeypatch.setattr(ov_runner, "_config", lambda *a: {**config(*a), "INFERENCE_PRECISION_HINT": "bf16"})
    if layers == "as asked":  # the hint alone is enough
        monkeypatch.setattr(ov_runner, "_layer_precisions", lambda compiled: iter(["f32"]))
    with pytest.raises(PrecisionMismatch) as caught:
        open_runner(make_record("openvino"), model)
    assert caught.value.expected == "f32"
    assert str(caught.value.got).startswith("bf16")


@pytest.mark.parametrize(
    ("asked", "layers", "right"),
    [
        ("f32", ["f32", "f32"], True),
        ("f32", ["f32", "bf16"], False),
        ("f32", ["f16"], False),
        ("f32", ["u8"], False),
        ("bf16", ["bf16", "f32"], True),
        ("bf16", ["f32", "f32"], False),
        ("f32", [], True),
    ],
)
def test_openvino_is_judged_by_what_its_layers_execute_too(
    asked: str, layers: list[str], right: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked == "bf16" and "bf16" not in cpu_description()["isa"]:
        pytest.skip("the CPU has no bf16")
    monkeypatch.setattr(ov_runner, "_layer_precisions", lambda compiled: iter(layers))
    record = make_record("openvino", precision=asked)
    if right:
        with open_runner(record, model) as runner:
            executed = runner.describe().details["executed"]
        assert executed == {0: "not reported", 1: "2 x f32", 2: "1 x bf16, 1 x f32"}[len(set(layers))]
    else:
        with pytest.raises(PrecisionMismatch):
            open_runner(record, model)


def test_openvino_is_imported_without_telemetry_and_leaves_its_package_alone(tmp_path: Path) -> None:
    code = """
        import socket
        def refuse(*args, **kwargs): raise RuntimeError("a socket was opened")
        socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
        from trtbuild.runtime.openvino import openvino_version
        openvino_version()
        assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
        import openvino_telemetry  # the user may still have it
        print("silent")
    """
    assert python(code, tmp_path) == "silent"
    assert list(tmp_path.iterdir()) == []


# --- onnxruntime


def test_onnxruntime_refuses_bf16(model: Path) -> None:
    with pytest.raises(EngineError, match="bf16") as caught:
        open_runner(make_record("onnxruntime", precision="bf16"), model)
    assert caught.value.expected == "f32"


@pytest.mark.parametrize("providers", ["CUDAExecutionProvider", "CUDAExecutionProvider, CPUExecutionProvider"])
def test_an_execution_provider_that_is_not_there_is_an_error_not_a_fallback(
    providers: str, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="not there") as caught:
        open_runner(make_record("onnxruntime", providers=providers), model)
    assert caught.value.expected == "CUDAExecutionProvider"
    assert capfd.readouterr() == ("", "")


def test_an_execution_provider_that_onnxruntime_drops_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this one is not dropped here")
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: both
    )  # installed, but its libraries do not load
    with (
        pytest.warns(UserWarning, match="not in available"),
        pytest.raises(EngineError, match="other execution providers"),
    ):
        open_runner(make_record("onnxruntime", providers=",".join(both)), model)


def test_an_execution_provider_of_unknown_precision_is_refused(model: Path) -> None:
    with pytest.raises(EngineError, match="pinned") as caught:
        open_runner(make_record("onnxruntime", providers="TensorrtExecutionProvider"), model)
    assert caught.value.got == "TensorrtExecutionProvider"


def test_onnxruntime_reports_its_providers_and_pins_f32_everywhere(model: Path) -> None:
    with open_runner(make_record("onnxruntime", providers="CPUExecutionProvider"), model) as runner:
        assert runner.describe().details["providers"] == "CPUExecutionProvider"
    assert ort_runner.PROVIDERS["CUDAExecutionProvider"] == {"use_tf32": "0"}


def test_onnxruntime_keeps_its_warnings_to_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network = small_unet(3)
    network.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, dtype=np.float32), "used_by_nobody"))
    with open_runner(make_record("onnxruntime"), write_model(tmp_path / "unused.onnx", network)) as runner:
        runner.infer(patches(1, 3))
    assert capfd.readouterr() == ("", "")


def test_an_onnxruntime_option_that_does_not_hold_is_a_mismatch() -> None:
    class Session:
        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_provider_options(self) -> dict[str, dict[str, str]]:
            return {"CUDAExecutionProvider": {"use_tf32": "1"}, "CPUExecutionProvider": {}}

    with pytest.raises(PrecisionMismatch, match="use_tf32"):
        ort_runner.check_read_back(Session(), ("CUDAExecutionProvider",), Path("x.onnx"))


# --- networks that do not fit


def _two_outputs() -> onnx.ModelProto:
    model = small_unet(3)
    model.graph.output.append(helper.make_tensor_value_info("skip", TensorProto.FLOAT, ("batch", 4, *PATCHES[3])))
    return model


def _halved() -> onnx.ModelProto:
    shape = ("batch", CHANNELS, *PATCHES[3])
    node = helper.make_node("MaxPool", ["input"], ["logits"], kernel_shape=[2, 2, 2], strides=[2, 2, 2])
    return model_from_nodes([node], shape, ("batch", CHANNELS, *(n // 2 for n in PATCHES[3])), {})


def _doubles() -> onnx.ModelProto:
    shape = ("batch", CHANNELS, *PATCHES[3])
    return model_from_nodes([helper.make_node("Neg", ["input"], ["logits"])], shape, shape, {}, TensorProto.DOUBLE)


@pytest.mark.parametrize("make", [_two_outputs, _halved, _doubles])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_network_that_is_no_map_from_patch_to_logits_is_refused(
    backend: str, make: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "odd.onnx", make())
    with pytest.raises(EngineError) as caught:
        open_runner(make_record(backend), path)
    assert caught.value.expected is not None
    assert caught.value.got is not None
    assert "odd.onnx" in str(caught.value.where)


# --- memory

STARVE = """
    import resource
    from pathlib import Path
    from runner_samples import CHANNELS, make_record, small_unet, with_profile, write_model
    import numpy as np
    from trtbuild.errors import OutOfMemory
    from trtbuild.runtime.select import open_runner
    import trtbuild.runtime.openvino, trtbuild.runtime.onnxruntime
    backend, folder = sys.argv[1:]
    path = write_model(Path(folder) / "large.onnx", small_unet(3, (128, 128, 128)))
    record = with_profile(make_record(backend, batch=1), (1, CHANNELS, 128, 128, 128))
    batch = np.zeros(record.profile.max, dtype=np.float32)
    small = write_model(Path(folder) / "small.onnx", small_unet(3))
    with open_runner(make_record(backend), small) as runner:  # libraries and thread stacks are there now
        runner.infer(np.zeros(make_record(backend).profile.max, dtype=np.float32))
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 40 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        with open_runner(record, path) as runner:
            runner.infer(batch)
    except OutOfMemory as error:
        print("OutOfMemory" if error.__cause__ is not None else "no cause")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_lack_of_memory_is_its_own_error(backend: str, tmp_path: Path) -> None:
    assert python(STARVE, tmp_path, backend, str(tmp_path)) == "OutOfMemory"


def test_only_certain_signs_count_as_lack_of_memory() -> None:
    for error, kind in (
        (MemoryError(), OutOfMemory),
        (RuntimeError("std::bad_alloc"), OutOfMemory),
        (RuntimeError("Failed to allocate 8 bytes of memory"), OutOfMemory),
        (RuntimeError("memory descriptor is wrong"), EngineError),
        (RuntimeError("out of range"), EngineError),
    ):
        with pytest.raises(EngineError) as caught, engine_errors("It failed.", "here", RuntimeError):
            raise error
        assert type(caught.value) is kind
        assert caught.value.__cause__ is error


def test_errors_of_other_kinds_pass_unchanged() -> None:
    with pytest.raises(KeyError), engine_errors("It failed.", "here", RuntimeError):
        raise KeyError("mine")


# --- choice


def test_an_unknown_backend_lists_the_known_ones_and_guesses(model: Path) -> None:
    with pytest.raises(EngineError, match="Did you mean openvino") as caught:
        open_runner(make_record("openvinno"), model)
    assert "onnxruntime" in str(caught.value.expected)
    with pytest.raises(EngineError, match="Did you mean onnxruntime"):
        choose_backend("onnx_runtime")
    with pytest.raises(EngineError, match="no such backend"):
        choose_backend("null")  # answers records that name it, is never chosen


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: "no NVIDIA driver")


@pytest.mark.usefixtures("no_gpu")
def test_auto_takes_the_first_that_is_there_and_keeps_why_not_the_others() -> None:
    choice = choose_backend("auto")
    assert choice.name == "openvino"
    assert choice.refused == tuple(
        (name, "GPU engines cannot run here: no NVIDIA driver.") for name in ("tensorrt", "tensorrt-rtx")
    )
    assert [(b.name, b.available, b.reason is None) for b in available_backends()] == [
        ("tensorrt", False, False), ("tensorrt-rtx", False, False), ("openvino", True, True),
        ("onnxruntime", True, True), ("onnxruntime-cuda", False, False),
    ]  # fmt: skip
    assert all(b.version for b in available_backends() if b.available)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def hide(*packages: str) -> None:
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return hide


@pytest.mark.usefixtures("no_gpu")
def test_auto_keeps_the_reason_of_every_refusal(missing: Callable[..., None]) -> None:
    missing("openvino")
    choice = choose_backend("auto")
    assert choice.name == "onnxruntime"
    assert [name for name, _ in choice.refused] == ["tensorrt", "tensorrt-rtx", "openvino"]
    assert "OpenVINO cannot be loaded" in choice.refused[2][1]


@pytest.mark.usefixtures("no_gpu")
def test_with_no_backend_at_all_every_reason_is_told(missing: Callable[..., None]) -> None:
    missing("openvino", "onnxruntime")
    with pytest.raises(EngineError, match="No backend") as caught:
        choose_backend("auto")
    assert "openvino:" in str(caught.value.got)
    assert "pip install 'trtbuild[graph]'" in str(caught.value.got)
    assert not any(b.available for b in available_backends())


def test_a_named_backend_never_falls_back(missing: Callable[..., None], model: Path) -> None:
    missing("openvino", "onnxruntime")
    with pytest.raises(MissingExtra, match=r"trtbuild\[graph\]"):
        choose_backend("onnxruntime")
    with pytest.raises(MissingExtra):
        open_runner(make_record("onnxruntime"), model)
    with pytest.raises(EngineError, match="pip install openvino"):
        choose_backend("openvino")


def test_selecting_loads_no_backend(tmp_path: Path) -> None:
    code = """
        import trtbuild.runtime.select, trtbuild.runtime.runner, trtbuild.runtime.null
        print([name for name in ("openvino", "onnxruntime", "onnx", "torch") if name in sys.modules])
    """
    assert python(code, tmp_path) == "[]"
