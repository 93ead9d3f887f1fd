"""Mistakes put into the preparation on a GPU one by one: every one of them is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from device_samples import EXAMPLES, SMALL_STAGING, check_unharmed, fake_gpu, opened_bench
from fake_cuda import CUBIN, Cuda
from specs import make_spec, spline
from test_device_mutants import mutated
from test_device_prepare import IMAGE, ISO, case_of, check, resident

from trtbuild.errors import InputError, NonFinite, OutOfMemory
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu import prepare as device_prepare
from trtbuild.runtime.gpu.prepare import DevicePrepared
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu
from trtbuild.spec import CT, RescaleTo01, RGBTo01, ZScore

TURNED = {"transpose_forward": (2, 0, 1), "transpose_backward": (1, 2, 0)}
TWO = {"channels": ("a", "b"), "normalization": (ZScore(masked=True), CT(lower=60, upper=130, mean=90, std=20))}
SPEC = make_spec(**TWO, **TURNED, spacing=(0.8, 1.3, 0.7))
SLICES = make_spec(**TWO, spacing=(4.0, 1.3, 0.7), resample_data=spline(3, order_z=1))

MUTANTS = {
    "the image in another order": ("prepare", "image.turned(spec.transpose_forward)", "image"),
    "nothing is cropped": ("prepare", "turned.cropped(box), resizing", "turned, resizing"),
    "channels over one another": ("prepare", "out.address + number * nbytes", "out.address"),
    "one channel for all": ("prepare", "cropped.channel(number)", "cropped.channel(0)"),
    "channels that go over one another": ("image", "offset=FLOAT * number * channel.size", "offset=0"),
    "NaN is let in": ("prepare", "if bad_plane(image, gpu, memory) is not None:", "if False:"),
    "freed under work": ("image", "stack.callback(gpu.stream.synchronize)", "stack.callback(int)"),
    "memory that is never freed": ("image", "stack.callback(memory[name].close)", "pass"),
    "a result that an error leaves": ("prepare", "    kept.callback(result.close)\n", ""),
    "a result that is closed": ("prepare", "kept.pop_all()", "pass"),
    "no look at the limit": ("prepare_plan", "free if limit is None else min(free, limit - held)", "free"),
    "what is held does not count": ("prepare_plan", "limit - held", "limit"),
    "a volume that is counted too small": ("prepare_plan", "max(voxels, *back, 0)", "voxels"),
    "the coarse axis like the others": ("prepare_plan", "if coarse is not None and", "if None and"),
    "nothing is clipped": ("prepare_plan", "clip = bool(across) and", "clip = False and"),
    "another order along the coarse axis": ("prepare_plan", "return how.order_z if", "return how.order if"),
    "words of the last kernel": ("normalize", "np.full(count, UNSET", "np.full(count, 0"),
    "one round of the flood": ("normalize", "if words(gpu, memory, 1)[0]:", "if True:"),
    "no mask": ("normalize", "if isinstance(scheme, ZScore) and scheme.masked else 0", "if False else 0"),
    "the mask is not counted": ("normalize", "mask, gpu, memory, power=0)", "0, gpu, memory, power=0)"),
    "deviation about 0": ("normalize", "power=2, centre=total / count", "power=2"),
    "sums that overflow": ("normalize", "require_finite(np.float32(total) + np.float32(squares), where)", "pass"),
    "any colour": ("normalize", "require_rgb(float(bottom), float(top), where)", "pass"),
    "results that overflow": ("normalize", "if first_not_finite(kernels", "if None and first_not_finite(kernels"),
    "range of the whole volume": ("resample", "axis=resizing.coarse))\n", "axis=None))\n"),
    "volumes over one another": ("resample", '"channel" if number % 2 else "between"', '"between"'),
    "operators over one another": ("resample", "        at += starts.nbytes + entries.nbytes\n", ""),
    "NaN on the device": ("run", "_check_finite_there(run)\n        else", "pass\n        else"),
    "a case that stays on the device": ("prepare", "            prepared.close()", "            pass"),
    "its image is counted twice": ("sizes", "{} if case.resident else", ""),
}  # fmt: skip
"""What is wrong, in which module of the device path, and what is replaced by what."""


def refused(words: str, data: object, gpu: Gpu, **changes: object) -> None:
    with pytest.raises(InputError, match=words):
        device_prepare.prepared_on_device(data, ISO, make_spec(**changes), gpu)  # type: ignore[arg-type]
    assert gpu.device.cuda.live == {}


def check_refusals(gpu: Gpu) -> None:
    bad = IMAGE.copy()
    bad[0, 3, 4, 5] = np.nan
    refused("NaN", bad, gpu)
    bad[0, 3, 4, 5] = 1e20
    refused("overflow", bad, gpu)
    refused("8-bit", IMAGE - 300, gpu, normalization=(RGBTo01(),))
    bad[0, 3, 4, 5], bad[0, 3, 4, 4] = 3e38, -3e38
    refused("overflow", bad, gpu, normalization=(RescaleTo01(),))


def check_limits(gpu: Gpu, cuda: Cuda) -> None:
    live = cuda.peak = 0
    device_prepare.prepared_on_device(IMAGE, ISO, make_spec(spacing=(0.8, 0.6, 1.3)), gpu).close()
    live = cuda.peak
    with pytest.raises(OutOfMemory):
        device_prepare.prepared_on_device(IMAGE, ISO, make_spec(spacing=(0.8, 0.6, 1.3)), gpu, limit=live - 1)
    cuda.allocations_left = 4
    with pytest.raises(OutOfMemory):
        device_prepare.prepared_on_device(IMAGE, ISO, make_spec(spacing=(0.8, 0.6, 1.3)), gpu)
    cuda.allocations_left = None
    assert cuda.live == {}


def check_prediction(cuda: Cuda) -> None:
    example = EXAMPLES["two channels"]
    with opened_bench(cuda, example) as one:
        here, same = resident(one, example)
        assert "image" not in here.plans()[0].buffers
        assert isinstance(here.prepared, DevicePrepared)
        same.data[0, 1, 2, 3] = np.inf
        one.gpu.upload(here.prepared.image, same.data)
        with pytest.raises(NonFinite):
            here.on_device()
        assert cuda.live == {}


def check_flood(gpu: Gpu) -> None:
    """A passage from a face that turns: the second part is reached in the second round."""
    wall = np.random.default_rng(0).normal(100, 30, (1, 9, 9, 9)).astype(np.float32)
    wall[0, 4, 4, :5] = wall[0, 4, 4:7, 4] = 0
    check(wall, ISO, make_spec(normalization=(ZScore(masked=True),)), gpu)


def battery() -> None:
    """Raises where anything is wrong."""
    with pytest.MonkeyPatch.context() as patch, fake_gpu() as cuda:
        patch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
        with opened_device() as device, opened_gpu(device, CUBIN, SMALL_STAGING) as gpu:
            image = case_of((12, 13, 14), channels=2)
            check(image, (1.1, 1.0, 1.0), SPEC, gpu)
            check(image, (5.0, 1.0, 1.0), SLICES, gpu)
            check(IMAGE, ISO, make_spec(spacing=(0.5, 0.6, 0.7)), gpu)
            check(IMAGE, ISO, make_spec(normalization=(RescaleTo01(),)), gpu)
            check_flood(gpu)
            check_refusals(gpu)
            check_limits(gpu, cuda)
        check_prediction(cuda)
        check_unharmed(cuda)


def test_without_a_mistake_nothing_is_noticed() -> None:
    battery()


@pytest.mark.parametrize("module", sorted({module for module, _, _ in MUTANTS.values()}))
def test_putting_a_mistake_in_is_none_by_itself(module: str) -> None:
    first = "from __future__ import annotations\n"
    with mutated(module, first, first + "# nothing else\n"):
        battery()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name: str) -> None:
    with mutated(*MUTANTS[name]), pytest.raises((Exception, pytest.fail.Exception)):
        battery()
