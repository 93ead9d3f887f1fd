"""Two GPUs in one process, each with a thread of its own: nothing of one is used while the other is current."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
from device_samples import EXAMPLES, SMALL_STAGING, Bench, assert_same, check_unharmed, opened_bench
from fake_cuda import CUBIN, Cuda, installed
from fake_kernels import give_kernels

from trtbuild.errors import EngineError
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.shared import opened_gpu

LONG = replace(EXAMPLES["folds"], shape=(1, 19, 40, 23), batch=3)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A driver with two GPUs, which must be as they were after the test."""
    fake = Cuda(memory=1 << 28, gpus=2)
    give_kernels(fake)
    for name, module in installed(fake).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: None)
    monkeypatch.setattr("trtbuild.runtime.gpu.graph.REPLAYS", 2)
    yield fake
    check_unharmed(fake)


@pytest.fixture
def benches(cuda: Cuda) -> Iterator[list[Bench]]:
    """The same case on each GPU, whose engines may be captured."""
    with ExitStack() as stack:
        made = []
        for index in range(2):
            bench = stack.enter_context(opened_bench(cuda, LONG))
            device = stack.enter_context(opened_device(index))
            made.append(replace(bench, gpu=stack.enter_context(opened_gpu(device, CUBIN, SMALL_STAGING))))
            for runner in made[-1].runners:
                runner.capturable = True
        yield made


def at_once(*work: Callable[[], object]) -> None:
    """Raises what any of the threads raised."""
    with ThreadPoolExecutor(len(work)) as pool:
        for future in [pool.submit(each) for each in work]:
            future.result(timeout=120)


def test_case_after_case_on_both_has_the_labels_of_the_cpu_path(cuda: Cuda, benches: list[Bench]) -> None:
    expected = benches[0].on_cpu()

    def cases(bench: Bench) -> None:
        for _ in range(3):
            assert_same(bench.on_device(), expected)

    at_once(*(lambda bench=bench: cases(bench) for bench in benches))
    assert cuda.graph_calls.count("cuGraphInstantiate") >= 2 * 3 * LONG.folds
    assert [bench.notes for bench in benches] == [[], []]


def test_a_failure_on_one_is_none_of_the_other(cuda: Cuda, benches: list[Bench]) -> None:
    bad, good = benches
    expected = good.on_cpu()
    bad.runners[1].fail_at = 0

    def fails() -> None:
        with pytest.raises(EngineError, match="as the test wants it"):
            bad.on_device()
        assert_same(bad.on_device(), expected)

    at_once(fails, lambda: assert_same(good.on_device(), expected))
    assert {each.gpu for each in cuda.live.values()} == set()


@pytest.mark.parametrize("what", ["memory", "stream"])
def test_the_fake_tells_where_one_gpu_is_used_for_the_other(benches: list[Bench], cuda: Cuda, what: str) -> None:
    here, there = (bench.gpu for bench in benches)
    with here.device.current():
        stream = (here if what == "memory" else there).stream.made()
        buffer = (there if what == "memory" else here).device.buffer(4)
        cuda.memset_d8_async(buffer.address, 0, 4, stream)
        del stream
    for gpu in (here, there):
        gpu.stream.synchronize()
    buffer.close()
    found, cuda.faults[:] = set(cuda.faults), []
    words = {"memory": "memory of GPU 1 on a stream of GPU 0", "stream": "a stream of GPU 1 where GPU 0 is current"}
    assert words[what] in found
