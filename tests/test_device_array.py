"""Arrays of other programs on the fake GPU, read where they are; labels that other programs read there."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from device_samples import SMALL_STAGING, check_unharmed, fake_gpu
from fake_cuda import CUBIN, Cuda
from gpu_arrays import Interface, OnCpu, Shared, holders, no_deleter, on_gpu, tensor_in
from numpy.typing import NDArray

from trtbuild.errors import EngineError, InputError
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu import dlpack
from trtbuild.runtime.gpu.array import SharedArray, shared_array
from trtbuild.runtime.gpu.labels import DeviceLabels
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu

IMAGE = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
TYPES = ("float32", "float64", "float16", "int8", "uint8", "int16", "uint16", "int32", "int64", "bool")


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@pytest.fixture
def gpu(cuda: Cuda) -> Iterator[Gpu]:
    with opened_device() as device, opened_gpu(device, CUBIN, SMALL_STAGING) as opened:
        yield opened


def values_of(found: SharedArray) -> NDArray[Any]:
    """What lies there, read as the addresses and strides say."""
    reach = sum(abs(s) * (n - 1) for s, n in zip(found.strides, found.shape, strict=True)) + 1
    back = sum(min(s, 0) * (n - 1) for s, n in zip(found.strides, found.shape, strict=True))
    size = found.dtype.itemsize
    memory = (ctypes.c_ubyte * (reach * size)).from_address(found.address + back * size)
    flat = np.ctypeslib.as_array(memory).view(found.dtype)[-back:]
    return np.lib.stride_tricks.as_strided(flat, found.shape, [s * size for s in found.strides]).copy()


def ways(array: NDArray[Any]) -> list[Any]:
    return [
        Shared(array=array), Shared(array=array, versions=False), Shared(array=array, device=(dlpack.CUDA_MANAGED, 0)),
        Interface(array=array), Interface(array=array, changes={"stream": 1}),
        Interface(array=array, changes={"version": 2}),
    ]  # fmt: skip


# --- reading


@pytest.mark.parametrize("dtype", TYPES)
def test_an_array_of_any_type_is_found(gpu: Gpu, dtype: str) -> None:
    with on_gpu(IMAGE.astype(dtype), gpu) as there:
        for way in ways(there):
            with shared_array(way, gpu) as found:
                assert (found.dtype.name, found.shape, found.address) == (dtype, IMAGE.shape, there.ctypes.data)
                np.testing.assert_array_equal(values_of(found), there)


def test_strides_are_those_of_the_array(gpu: Gpu) -> None:
    with on_gpu(IMAGE.astype("f4"), gpu) as there:
        views = (there.transpose(0, 3, 1, 2), there[:, ::-1, :, ::2], there[:, 1:, 2:, 1:], there[..., :1],
                 np.lib.stride_tricks.as_strided(there, strides=(240, 0, 20, 4)))  # fmt: skip
        for view in views:
            for way in ways(view):
                with shared_array(way, gpu) as found:
                    np.testing.assert_array_equal(values_of(found), view)


def test_no_strides_are_c_order_and_the_byte_offset_counts(gpu: Gpu) -> None:
    with on_gpu(IMAGE.astype("f4"), gpu) as there:
        null = ctypes.POINTER(ctypes.c_int64)()
        shared = Shared(array=there, versions=False, changes={"strides": null})
        for way in (
            shared,
            Interface(array=there, changes={"strides": None}),
            Interface(array=there, changes={"strides": ...}),
        ):
            with shared_array(way, gpu) as found:
                np.testing.assert_array_equal(values_of(found), there)
        shared = Shared(array=there[:1], changes={"byte_offset": 4 * there[0].size})
        with shared_array(shared, gpu) as found:
            np.testing.assert_array_equal(values_of(found), there[1:])


@pytest.mark.parametrize("versions", [True, False])
def test_an_array_is_released_once_at_the_end(gpu: Gpu, versions: bool) -> None:
    with on_gpu(IMAGE.astype("f4"), gpu) as there:
        before = holders(there)
        shared = Shared(array=there, versions=versions)
        for _ in range(3):
            with shared_array(shared, gpu):
                assert holders(there) == before + 2, "in the object, and in the capsule"
            assert holders(there) == before + 1
        assert set(shared.streams) == {gpu.stream.handle}, "the producer waits on our stream"


def test_what_is_under_way_is_done_before_the_array_is_released(gpu: Gpu, cuda: Cuda) -> None:
    done: list[str] = []
    with on_gpu(IMAGE.astype("f4"), gpu) as there:
        shared = Shared(array=there)
        capsule = shared.__dlpack__(stream=None, max_version=(1, 0))
        real = dlpack.Deleter(lambda address: done.append("released"))
        tensor_in(capsule).deleter = real
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Shared, "__dlpack__", lambda self, **_: capsule)
            with shared_array(shared, gpu) as found:
                cuda.run_on(gpu.stream.handle, lambda: done.append("read"), {found.address})
        assert done == ["read", "released"]


def test_an_interface_with_a_stream_waits_for_all_of_the_context(gpu: Gpu, cuda: Cuda) -> None:
    done: list[str] = []
    other = gpu.device.stream()
    with on_gpu(IMAGE.astype("f4"), gpu) as there:
        for changes, waits in (({"stream": 7}, True), ({"version": 2}, True), ({"stream": None}, False)):
            done.clear()
            cuda.run_on(other.handle, lambda: done.append("written"), {there.ctypes.data})
            with shared_array(Interface(array=there, changes=changes), gpu):
                assert done == ["written"] * waits
            other.synchronize()
    other.close()


def test_an_array_without_a_deleter_is_nobodys(gpu: Gpu) -> None:
    with (
        on_gpu(IMAGE.astype("f4"), gpu) as there,
        shared_array(Shared(array=there, changes={"deleter": no_deleter}), gpu) as found,
    ):
        np.testing.assert_array_equal(values_of(found), there)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "another version": ("dlpack", {"major": 2}, "another version"),
    "complex numbers": ("dlpack", {"dtype.code": 5}, "no real numbers"),
    "bfloat16": ("dlpack", {"dtype.code": 4, "dtype.bits": 16}, "no real numbers"),
    "pairs": ("dlpack", {"dtype.lanes": 2}, "no real numbers"),
    "four bits": ("dlpack", {"dtype.bits": 4}, "no real numbers"),
    "floats of 8 bits": ("dlpack", {"dtype.bits": 8}, "no real numbers"),
    "truths of 32 bits": ("dlpack", {"dtype.code": 6}, "no real numbers"),
    "complex numbers by the interface": ("interface", {"typestr": "<c8"}, "no real numbers"),
    "nothing at all": ("interface", {"typestr": "|V0"}, "no real numbers"),
    "no memory": ("dlpack", {"data": None}, "address"),
    "an odd address": ("dlpack", {"byte_offset": 2}, "address"),
    "no shape": ("interface", {"shape": ...}, "cannot be read"),
    "a type of nothing": ("interface", {"typestr": "?!"}, "cannot be read"),
    "no data": ("interface", {"data": ...}, "cannot be read"),
    "data of nothing": ("interface", {"data": None}, "cannot be read"),
    "a null pointer": ("interface", {"data": (0, False)}, "address"),
    "an address of None": ("interface", {"data": (None, False)}, "address"),
    "strides that split": ("interface", {"strides": (240, 80, 20, 3)}, "whole elements"),
    "too few strides": ("interface", {"strides": (240, 80, 20)}, "whole elements"),
    "a mask": ("interface", {"mask": 1}, "masked"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_and_released(gpu: Gpu, name: str) -> None:
    protocol, changes, message = BAD[name]
    with on_gpu(IMAGE.astype("f4"), gpu) as there:
        kind = Shared if protocol == "dlpack" else Interface
        before = holders(there)
        with pytest.raises(InputError, match=message), shared_array(kind(array=there, changes=changes), gpu):
            pass
        assert holders(there) == before


@pytest.mark.parametrize(
    ("device", "where"), [((dlpack.CUDA, 1), "GPU 1"), ((dlpack.CPU, 0), "the host"), ((10, 0), r"device \(10, 0\)")]
)
def test_an_array_elsewhere_is_refused(gpu: Gpu, device: tuple[int, int], where: str) -> None:
    shared = Shared(array=IMAGE.astype("f4"), device=device)
    with pytest.raises(InputError, match=where), shared_array(shared, gpu):
        pass
    with pytest.raises(InputError, match="the host"), shared_array(IMAGE, gpu):
        pass


@pytest.mark.parametrize("thing", [None, [1.0], "array", object()], ids=repr)
def test_what_is_no_array_is_refused(gpu: Gpu, thing: Any) -> None:
    with pytest.raises(InputError, match="no array on a GPU"), shared_array(thing, gpu):
        pass


def test_a_library_that_refuses_is_named_as_the_cause(gpu: Gpu) -> None:
    class Refuses(Shared):
        def __dlpack__(self, **_: Any) -> Any:
            raise RuntimeError("requires gradient")

    with pytest.raises(InputError, match="requires gradient") as caught, shared_array(Refuses(array=IMAGE), gpu):
        pass
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("name", ["__dlpack__", "__cuda_array_interface__"])
def test_a_library_that_fails_before_is_named_too(gpu: Gpu, name: str) -> None:
    """torch raises for tensors that require gradients when it is merely asked whether it has the interface."""

    class Fails:
        def __getattribute__(self, asked: str) -> Any:
            if asked == name:
                raise RuntimeError("requires gradient")
            raise AttributeError(asked)

    with pytest.raises(InputError, match="requires gradient"), shared_array(Fails(), gpu):
        pass


def test_a_capsule_is_used_once(gpu: Gpu) -> None:
    with on_gpu(IMAGE.astype("f4"), gpu) as there:
        before = holders(there)
        capsule = Shared(array=there).__dlpack__(stream=None)
        held = dlpack.taken(capsule)
        with pytest.raises(InputError, match="was used"):
            dlpack.taken(capsule)
        held.release()
        del capsule, held
        gc.collect()
        assert holders(there) == before
    with pytest.raises(InputError, match="no DLPack capsule"):
        dlpack.taken("capsule")


# --- labels


def labels_there(gpu: Gpu, dtype: str = "uint8") -> tuple[DeviceLabels, NDArray[Any]]:
    values = np.arange(3 * 4 * 5).reshape(3, 4, 5).astype(dtype) * (257 if dtype == "uint16" else 1)
    buffer = gpu.device.buffer(values.nbytes)
    gpu.upload(buffer, values)
    return DeviceLabels(buffer, values.shape, values.dtype, gpu.device.index), values


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("versions", [True, False])
def test_numpy_reads_the_labels_where_they_are(gpu: Gpu, dtype: str, versions: bool) -> None:
    labels, values = labels_there(gpu, dtype)
    source = OnCpu(shared=labels)
    if versions:
        array = np.from_dlpack(source)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OnCpu, "__dlpack__", lambda self, **_: _without_version(self))
            array = np.from_dlpack(source)
    np.testing.assert_array_equal(array, values)
    assert array.dtype == dtype
    assert array.ctypes.data == labels.address
    with pytest.raises(EngineError, match="still in use"):
        labels.close()
    del array
    labels.close()


def _without_version(source: OnCpu) -> Any:
    capsule = source.shared.__dlpack__()
    managed = tensor_in(capsule)
    assert isinstance(managed, dlpack.Managed)
    managed.tensor.device.kind = dlpack.CPU
    return capsule


def test_labels_are_read_by_either_protocol(gpu: Gpu) -> None:
    labels, values = labels_there(gpu, "uint16")

    class OnlyInterface:
        __cuda_array_interface__ = labels.__cuda_array_interface__

    for way in (labels, OnlyInterface()):
        with shared_array(way, gpu) as found:
            np.testing.assert_array_equal(values_of(found), values)
    assert labels.__dlpack_device__() == (2, 0)
    assert labels.__cuda_array_interface__["stream"] is None, "they are all there"
    labels.close()


def test_the_array_outlives_the_labels_object_and_then_the_memory_goes(gpu: Gpu, cuda: Cuda) -> None:
    labels, values = labels_there(gpu)
    array = np.from_dlpack(OnCpu(shared=labels))
    del labels
    gc.collect()
    np.testing.assert_array_equal(array, values)
    del array
    gc.collect()
    assert cuda.live == {}


def test_a_capsule_that_nobody_takes_holds_nothing(gpu: Gpu, cuda: Cuda) -> None:
    labels, _ = labels_there(gpu)
    for version in (None, (0, 8), (1, 0), (1, 1)):
        capsule = labels.__dlpack__(max_version=version)
        assert dlpack.is_exported(labels)
        del capsule
        assert not dlpack.is_exported(labels)
    labels.close()
    labels.close()
    assert cuda.live == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_that_goes_with_an_error_does_not_hide_it(gpu: Gpu, version: tuple[int, int] | None) -> None:
    """Whoever refuses it drops it while its error is on the way: NumPy does, which reads no GPU."""
    labels, _ = labels_there(gpu)
    for refuses in (np.from_dlpack, lambda it: int(it.__dlpack__(max_version=version))):
        with pytest.raises((RuntimeError, BufferError, ValueError, TypeError)) as caught:
            refuses(labels)
        assert "exception" not in str(caught.value)
        del caught
        gc.collect()
        assert not dlpack.is_exported(labels)
    labels.close()


def test_an_array_is_released_in_a_thread_without_pythons_lock(gpu: Gpu) -> None:
    labels, _ = labels_there(gpu)
    capsule = labels.__dlpack__()
    managed = tensor_in(capsule)
    dlpack.taken(capsule)
    deleter = ctypes.cast(managed.deleter, ctypes.c_void_p).value
    unlocked = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(deleter)  # type: ignore[arg-type]
    assert dlpack.is_exported(labels)
    thread = threading.Thread(target=unlocked, args=[ctypes.addressof(managed)])
    thread.start()
    thread.join()
    assert not dlpack.is_exported(labels)
    labels.close()


def test_a_numpy_that_knows_no_versions_shares_labels_too(gpu: Gpu) -> None:
    class Old(np.ndarray):
        def __dlpack__(self, *, stream: Any = None) -> Any:  # type: ignore[override]
            return super().__dlpack__(stream=stream)

    labels, values = labels_there(gpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtbuild.runtime.gpu.dlpack.np.asarray", lambda lent: np.array(lent, copy=False).view(Old))
        with shared_array(labels, gpu) as found:
            np.testing.assert_array_equal(values_of(found), values)
    labels.close()


def test_labels_that_nobody_holds_are_freed_in_any_thread(gpu: Gpu, cuda: Cuda) -> None:
    held = [labels_there(gpu)[0]]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert cuda.live == {}


def test_labels_that_were_given_back_cannot_be_read(cuda: Cuda) -> None:
    with opened_device() as device, opened_gpu(device, CUBIN, SMALL_STAGING) as gpu:
        labels, _ = labels_there(gpu)
    with pytest.raises(EngineError, match="given back"):
        labels.__dlpack__()
    with pytest.raises(EngineError, match="given back"):
        labels.__cuda_array_interface__  # noqa: B018


@pytest.mark.parametrize("arguments", [{"copy": True}, {"dl_device": (1, 0)}, {"dl_device": (2, 1)}])
def test_a_copy_or_another_device_is_refused_as_the_standard_says(gpu: Gpu, arguments: dict[str, Any]) -> None:
    labels, _ = labels_there(gpu)
    with pytest.raises(BufferError):
        labels.__dlpack__(**arguments)
    labels.__dlpack__(stream=1, dl_device=(2, 0), copy=False)
    labels.close()
