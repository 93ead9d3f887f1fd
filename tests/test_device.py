"""The GPU's side of the runtime, on a fake pycuda that notes what a real GPU would do in silence."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import CUBIN, Cuda, LaunchError, LogicError, installed

import trtbuild.runtime.device
from trtbuild.errors import EngineError, MissingExtra, OutOfMemory
from trtbuild.runtime.device import Device, opened_device
from trtbuild.runtime.gpu.parts import Closable


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    fake = Cuda(capability=(9, 0), memory=1 << 20)
    for name, module in installed(fake).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: None)
    yield fake
    assert fake.faults == []
    assert fake.leaks() == []
    assert fake.stack() == []


def test_a_device_tells_what_it_is(cuda: Cuda) -> None:
    with opened_device() as device:
        assert (device.name, device.capability, device.driver, device.memory) == ("Test GPU", "9.0", "13.0", 1 << 20)


def test_without_a_driver_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: "no NVIDIA driver (libcuda.so.1 is not there)")
    with pytest.raises(EngineError, match="no NVIDIA driver") as caught, opened_device():
        pass
    assert len(str(caught.value).splitlines()) == 1


def test_without_pycuda_the_extra_is_named(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(MissingExtra, match=r"trtbuild\[gpu\]"), opened_device():
        pass


def test_a_pycuda_that_cannot_be_loaded_is_another_error(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(EngineError, match="pycuda cannot be loaded") as caught, opened_device():
        pass
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_gpu_that_is_not_there_is_an_error(cuda: Cuda) -> None:
    with pytest.raises(EngineError, match="invalid device ordinal") as caught, opened_device(3):
        pass
    assert caught.value.where == "GPU 3"


def test_the_primary_context_is_taken_and_never_autoinit(cuda: Cuda) -> None:
    with opened_device() as device, device.current():
        assert len(cuda.stack()) == 1
    assert "pycuda.autoinit" not in sys.modules


def test_what_is_copied_in_comes_out_after_the_stream(cuda: Cuda) -> None:
    with opened_device() as device:
        stream, buffer = device.stream(), device.buffer(48)
        source, target = device.pinned((3, 4)), device.pinned((3, 4))
        source.array[...] = np.arange(12).reshape(3, 4)
        stream.copy_in(buffer, source.array)
        stream.copy_out(target.array, buffer)
        assert np.isnan(target.array).all(), "nothing has waited for it"
        stream.synchronize()
        assert np.array_equal(target.array, np.arange(12).reshape(3, 4))


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_copy_beyond_the_buffer_is_refused_before_it_begins(cuda: Cuda, direction: str) -> None:
    with opened_device() as device:
        stream, buffer, host = device.stream(), device.buffer(16), device.pinned((5,))
        with pytest.raises(EngineError, match="larger than its device memory"):
            stream.copy_in(buffer, host.array) if direction == "in" else stream.copy_out(host.array, buffer)


def test_the_context_is_current_in_the_block_and_popped_after_any_end(cuda: Cuda) -> None:
    with opened_device() as device:
        for error in (KeyError("mine"), LogicError("invalid value"), KeyboardInterrupt()):
            with pytest.raises((KeyError, EngineError, KeyboardInterrupt)), device.current():
                _raise_in(cuda, error)
            assert cuda.stack() == []


def _raise_in(cuda: Cuda, error: BaseException) -> None:
    assert len(cuda.stack()) == 1
    raise error


def test_every_thread_makes_the_device_its_own(cuda: Cuda) -> None:
    failures: list[BaseException] = []
    with opened_device() as device:

        def work() -> None:
            try:
                stream, buffer, host = device.stream(), device.buffer(4), device.pinned((1,))
                host.array[0] = 7
                stream.copy_in(buffer, host.array)
                for each in (stream, host, buffer):
                    each.close()
                assert cuda.stack() == []
            except BaseException as error:  # noqa: BLE001 the assertion is made in the main thread
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert failures == []


def test_what_is_left_is_closed_with_the_device_even_after_an_error(cuda: Cuda) -> None:
    with pytest.raises(KeyError), opened_device() as device:
        _leave_work_and_fail(device)
    assert cuda.leaks() == []


def _leave_work_and_fail(device: Device) -> None:
    buffer, host = device.buffer(16), device.pinned((4,))
    stream = device.stream()
    host.array[...] = 1
    stream.copy_in(buffer, host.array)
    raise KeyError("mine")


def test_closing_twice_is_allowed_and_waits_for_work(cuda: Cuda) -> None:
    with opened_device() as device:
        stream, buffer, host = device.stream(), device.buffer(16), device.pinned((4,))
        host.array[...] = 3
        stream.copy_in(buffer, host.array)
        for _ in range(2):
            for each in (stream, buffer, host):
                each.close()
        stream.synchronize()  # nothing is under way
        with pytest.raises(AttributeError):
            _ = host.array


def test_what_was_closed_is_not_kept_by_its_device(cuda: Cuda) -> None:
    """Every case takes events, graphs and memory anew."""
    with opened_device() as device:
        kept = list(_closed(device))
        gc.collect()
        assert [reference() for reference in kept] == [None] * 6


def _closed(device: Device) -> Iterator[weakref.ref[Closable]]:
    stream = device.stream()
    graph = device.graph(stream, lambda: None)
    for each in (graph, stream, device.event(), device.buffer(4), device.pinned((1,)), device.module(CUBIN)):
        each.close()
        yield weakref.ref(each)


def test_a_lack_of_device_memory_is_an_error_of_its_own(cuda: Cuda) -> None:
    with opened_device() as device:
        with pytest.raises(OutOfMemory) as caught:
            device.buffer(2 << 20)
        assert isinstance(caught.value.__cause__, MemoryError)
        assert device.buffer(1 << 20).nbytes == 1 << 20


def test_an_error_of_the_work_comes_where_it_is_waited_for(cuda: Cuda) -> None:
    with opened_device() as device:
        stream = device.stream()
        cuda.fail_next = LaunchError("an illegal memory access was encountered")
        with pytest.raises(EngineError, match="illegal memory access") as caught:
            stream.synchronize()
        assert type(caught.value) is EngineError
        assert caught.value.where == "Test GPU"


def test_the_rest_is_closed_where_one_fails(cuda: Cuda) -> None:
    with ExitStack() as stack:
        device = stack.enter_context(opened_device())
        device.buffer(16)
        device.stream()
        cuda.fail_next = LaunchError("unspecified launch failure")
        with pytest.raises(EngineError, match="launch failure"):
            stack.close()
    assert cuda.leaks() == []


def test_only_this_file_imports_pycuda_and_only_when_a_device_is_opened() -> None:
    package = Path(trtbuild.__file__).parent
    users = [path for path in package.rglob("*.py") if "import pycuda" in path.read_text()]
    assert users == [Path(trtbuild.runtime.device.__file__)]
    assert "pycuda" not in vars(trtbuild.runtime.device)
