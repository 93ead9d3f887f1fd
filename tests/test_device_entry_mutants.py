"""Mistakes put into the entry for arrays on a GPU one by one: every one of them is noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from device_samples import EXAMPLES, check_unharmed, fake_gpu
from fake_cuda import Cuda
from gpu_arrays import Interface, Shared, holders
from test_device_entry import Entry, entered, values
from test_device_mutants import mutated

from trtbuild.errors import InputError, OutOfMemory, TrtbuildError
from trtbuild.runtime.gpu import array as device_array

MUTANTS = {
    "an array that is never released": ("array", "stack.callback(held.release)", "pass"),
    "an array that is released twice": ("array", "stack.callback(held.release)", "stack.callback(held.release)()"),
    "an array that is released under work": ("array", "stack.callback(gpu.stream.synchronize)", "stack.callback(int)"),
    "no stream for the producer": ("array", "stream = gpu.stream.handle", "stream = None"),
    "no wait for the producer": ("array", "gpu.device.cuda.Context.synchronize()", "pass"),
    "strides in bytes": ("array", "step // dtype.itemsize for step in steps)", "step for step in steps)"),
    "strides that are left out": ("array", "if tensor.strides else _c_order(shape)", "if None else _c_order(shape)"),
    "another GPU's array": ("array", "(kind == CUDA and index != gpu.device.index)", "False"),
    "a copy with the array's strides": ("entry", ", strides=(z * y * x, y * x, x, 1))", ")"),
    "a copy that is never freed": ("entry", "stack.callback(copy.close)", "pass"),
    "a copy that is freed at once": ("entry", "stack.callback(copy.close)", "copy.close()"),
    "labels that are freed": ("entry", "stack.pop_all()", "pass"),
    "labels that an error leaves": ("entry", "stack.callback(labels.close)", "pass"),
    "a case that stays on the device": ("entry", "stack.enter_context(closed_after(prepared))", "pass"),
    "a shape in the network's order": ("entry", "in spec.transpose_backward", "in range(3)"),
    "labels that belong to the case": ("run", 'memory["labels"] = labels', 'stack.callback(labels.close)'),
    "the first bad voxel is another": ("image", "cropped(line)", "cropped((slice(0, 1), *line[1:]))"),
    "labels that do not count": ("sizes", "(self.whole_label_bytes,) * self.labels_stay", "()"),
}  # fmt: skip
"""What is wrong, in which module of the device path, and what is replaced by what."""


def check_labels(cuda: Cuda, name: str, dtype: str) -> None:
    with entered(cuda, EXAMPLES[name], dtype) as entry:
        for same in (entry, replace(entry, there=entry.there[:, ::-1])):
            array = same.there
            before = holders(array)
            check_one(cuda, same)
            assert holders(array) == before


def check_one(cuda: Cuda, entry: Entry) -> None:
    expected, shared = entry.expected(), Shared(array=entry.there)
    for image in (shared, Interface(array=entry.there)):
        found = entry.predicted(image)
        assert found.labels.shape == expected.shape
        np.testing.assert_array_equal(values(found, cuda), expected)
        found.labels.close()
        assert entry.left() == 0
    assert shared.streams == [entry.one.gpu.stream.handle]


def check_waits(cuda: Cuda) -> None:
    """For the producer before the array is read, and for the readers before it is released."""
    with entered(cuda, EXAMPLES["3D"]) as entry:
        gpu, done, there = entry.one.gpu, list[str](), entry.there
        other = gpu.device.stream()
        cuda.run_on(other.handle, lambda: done.append("written"), {there.ctypes.data})
        with device_array.shared_array(Interface(array=there, changes={"stream": 1}), gpu):
            assert done == ["written"]
            cuda.run_on(gpu.stream.handle, lambda: done.append("read"), {there.ctypes.data})
        assert done == ["written", "read"]
        other.close()


def check_refusals(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["3D"]) as entry:
        with pytest.raises(InputError, match="not on the model's GPU"):
            entry.predicted(Shared(array=entry.there, device=(2, 1)))
        entry.there[0, 3, 4, 5] = np.nan
        with pytest.raises(InputError, match=r"\(3, 4, 5\)"):
            entry.predicted()


def check_faults(cuda: Cuda) -> None:
    with entered(cuda, EXAMPLES["3D"]) as entry:
        for limit in (entry.one.plans()[1].nbytes, entry.one.plans()[1].nbytes - 1):  # one that fits just, or not
            cuda.peak = 0
            entry.predicted(limit=limit).labels.close()
            assert cuda.peak - entry.there.nbytes <= limit
        entry.one.runners[0].fail_at = len(entry.one.runners[0].batches) + 1
        with pytest.raises(TrtbuildError):
            entry.predicted()
        with pytest.raises(OutOfMemory):
            entry.predicted(limit=1000)
        assert entry.left() == 0


def battery() -> None:
    """Raises where anything is wrong."""
    with pytest.MonkeyPatch.context() as patch, fake_gpu() as cuda:
        patch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
        check_labels(cuda, "transposed", "float32")
        check_labels(cuda, "two channels", "int16")
        check_waits(cuda)
        check_refusals(cuda)
        check_faults(cuda)
        check_unharmed(cuda)


@pytest.mark.parametrize("module", ["none", *sorted({module for module, _, _ in MUTANTS.values()})])
def test_putting_a_mistake_in_is_none_by_itself(module: str) -> None:
    first = "from __future__ import annotations\n"
    if module == "none":
        battery()
        return
    with mutated(module, first, first + "# nothing else\n"):
        battery()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name: str) -> None:
    with mutated(*MUTANTS[name]), pytest.raises((Exception, pytest.fail.Exception)):
        battery()
