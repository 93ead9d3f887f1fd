"""Mistakes that a GPU would make in silence, put into the device path one by one: every one of them is noticed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from device_samples import EXAMPLES, SPLINE, Bench, Example, assert_same, check_unharmed, fake_gpu, opened_bench

from trtbuild.errors import Cancelled, NonFinite
from trtbuild.runtime import Prediction
from trtbuild.runtime.predictor import case_logits

CASES = ("transposed", "mirrored, several windows in a call", "2D, many slices in a call", "smaller than the patch",
         "a batch that engines need", "regions", "folds")  # fmt: skip
LOGITS = Example(spec=SPLINE, shape=(1, 33, 14, 13), spacing=(1.2, 0.8, 1.0), axes=(0, 1), folds=2, batch=6)
THIN = replace(LOGITS, shape=(1, 41, 12, 10), spacing=(1.1, 1.0, 1.0), axes=(), folds=3, batch=8)

ZERO = 'gpu.stream.zero(memory["accumulator"], memory["accumulator"].nbytes)'
WAIT_IN = "            event.wait()  # before the half is written again\n"
WAIT_OUT = "    event.wait()\n    part[...] = half"
FOLDS, DEPTH = "in enumerate(engines):", "return accumulator_depth(self.rows)"
NO_LIMIT, SHORT = '("float32",) if limit is None', "except OutOfMemory as error:"

MUTANTS = {
    "the window's place without the base": ("rows", "start=(z - base, y, x)", "start=(z, y, x)"),
    "a base that is one slice off": ("rows", "base = row.keep\n", "base = row.keep - 1\n"),
    "a shift that is one slice short": ("rows", "_shift(run, row.keep - base)", "_shift(run, row.keep - base - 1)"),
    "no shift": ("rows", "_shift(run, row.keep - base)", "pass"),
    "weights of swapped axes": ("rows", "zip(run.tables.weights, (z, y, x)", "zip(run.tables.weights, (z, x, y)"),
    "logits of the first window for all": ("rows", "case.logit_bytes * skipped", "case.logit_bytes * 0"),
    "flips of another tile": ("rows", "(group.at + skipped)", "(group.at + skipped + 1)"),
    "folds in another order": ("rows", FOLDS, "in reversed([*enumerate(engines)]):"),
    "no look at the status word": ("rows", "if status[0] != NO_TILE:", "if False:"),
    "the status word of another row": ("rows", "- before * len(engines), row.tiles)", ", row.tiles)"),
    "padding that is not left out": ("rows", "offset=(z, y, x)", "offset=(0, 0, 0)"),
    "swapped flips": ("tables", "packed_tile(tile.start, tile.flip)", "packed_tile(tile.start, tile.flip[::-1])"),
    "a table that is one tile off": ("tables", "min(i, group.size - 1)", "max(0, min(i, group.size - 1) - 1)"),
    "a call beyond its window": ("tables", "// flips * flips + flips)", "// flips * flips + flips + 1)"),
    "labels of the wrong heads": ("tables", "np.array(way.labels.values, ", "np.array(way.labels.values[::-1], "),
    "a sum that begins with anything": ("run", ZERO, "pass"),
    "memory freed under work": ("run", "stack.callback(gpu.stream.synchronize)", "pass"),
    "memory freed at once": ("run", "stack.callback(memory[name].close)", "memory[name].close()"),
    "memory that is never freed": ("run", "stack.callback(memory[name].close)", "pass"),
    "an upload that does not wait": ("staging", WAIT_IN, ""),
    "an upload from any memory": ("staging", "copy_in(target, half", "copy_in(target, flat[first:last]"),
    "an upload to the wrong place": ("staging", "offset + kind.itemsize * first", "offset"),
    "a download that does not wait": ("staging", WAIT_OUT, "    part[...] = half"),
    "a download from the wrong place": ("staging", "offset + target.itemsize * first", "offset"),
    "one half for all": ("staging", "at = nbytes * (number % HALVES)", "at = 0"),
    "an engine on another stream": ("shared", "self.stream.handle, batch)", "self.device.stream().handle, batch)"),
    "kernels on another stream": ("shared", "self.stream.launch(", "self.device.stream().launch("),
    "labels that all begin at slice 0": ("outputs", "corner + first * full.strides[0]", "corner"),
    "labels without the crop": ("outputs", "part.start * stride for", "0 * stride for"),
    "a slab at the place of another": ("outputs", "cropped[a:b] = slab", "cropped[first : first + b - a] = slab"),
    "taps of the first slices": ("outputs", "z=z + TAP_BYTES * first", "z=z"),
    "an origin without the base": ("outputs", "origin_z=base + skipped - z", "origin_z=skipped - z"),
    "padding with swapped axes": ("outputs", "y * width + x", "x * width + y"),
    "slices that are not final": ("outputs", "min(final, int(inside.stop))", "min(final + 1, int(inside.stop))"),
    "an accumulator that is one slice short": ("plan", DEPTH, DEPTH + " - 1"),
    "rows that overlap in one": ("plan", "row.start >= last.stop", "row.start > last.start"),
    "a plan that does not fit": ("plan", "if plan.nbytes + engines <= free", "if plan.nbytes <= free + engines"),
    "float16 that nobody allowed": ("attempts", NO_LIMIT, '("float16",) if limit is None'),
    "no second run": ("attempts", SHORT, "except ZeroDivisionError as error:"),
    "another run after any error": ("attempts", SHORT, "except EngineError as error:"),
    "a second run in silence": ("attempts", '        report(f"The GPU had', '        str(f"The GPU had'),
    "a limit that is not kept": ("attempts", "if allowed - all_of_them < free - missing:", "if False:"),
    "float16 in silence": ("attempts", "report(IN_HALF)", "str(IN_HALF)"),
}
"""What is wrong, in which module of the device path, and what is replaced by what."""

USERS = ("trtbuild.runtime.", "device_samples", "test_device")


@contextmanager
def mutated(module: str, old: str, new: str) -> Iterator[None]:
    """The device path with one mistake: whoever took something from the module gets the changed one."""
    changed = importlib.import_module(f"trtbuild.runtime.gpu.{module}")
    path = Path(str(changed.__file__))
    source = path.read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {path.name}"
    users = [m for name, m in sys.modules.items() if isinstance(m, ModuleType) and name.startswith(USERS)]
    kept = {user: dict(vars(user)) for user in users}
    before = dict(vars(changed))
    try:
        exec(compile(source.replace(old, new), str(path), "exec"), vars(changed))
        fresh = {id(before[name]): value for name, value in vars(changed).items() if callable(before.get(name))}
        for user in users:
            for name, value in kept[user].items():
                if user is not changed and callable(value) and id(value) in fresh:
                    setattr(user, name, fresh[id(value)])
        yield
    finally:
        for user, names in kept.items():
            for name in [name for name in vars(user) if name not in names]:
                delattr(user, name)
            for name, value in names.items():
                setattr(user, name, value)


@cache
def on_cpu(name: str) -> Prediction:
    with fake_gpu() as cuda, opened_bench(cuda, EXAMPLES[name]) as one:
        return one.on_cpu()


def check_labels(name: str) -> None:
    with fake_gpu() as cuda:
        with opened_bench(cuda, EXAMPLES[name]) as one:
            least = {plan.labels: plan for plan in one.every_plan()}
            for plan in (*least.values(), one.plans()[0]):
                assert_same(one.with_plan(plan), on_cpu(name))
                check_given_back(one)
        check_unharmed(cuda)


def check_logits(example: Example) -> None:
    """Bit for bit, where they come back to the host."""
    with fake_gpu() as cuda, opened_bench(cuda, example) as one:
        expected = case_logits(one.prepared, one.member, one.settings, None)
        np.testing.assert_array_equal(one.logits_on_device(), expected)


def check_nan() -> None:
    """The message is the CPU's, and the case is over at once."""
    with fake_gpu() as cuda, opened_bench(cuda, replace(LOGITS, spec=EXAMPLES["3D"].spec)) as one:
        messages = []
        late = one.prepared.data[:, 25:].max()
        one.runners[1].poison = float(np.nextafter(late, 0, dtype=np.float32))
        one.prepared.data[:, :25] = np.minimum(one.prepared.data[:, :25], one.runners[1].poison)
        for run in (one.on_cpu, one.on_device):
            with pytest.raises(NonFinite) as caught:
                run()
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert one.notes == []
        check_given_back(one)


def check_stop() -> None:
    with fake_gpu() as cuda:
        with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
            with pytest.raises(Cancelled):
                one.on_device(lambda stage, done, total: done < 20)
            check_given_back(one)
            one.runners[0].fail_at = len(one.runners[0].batches) + 3
            with pytest.raises(Exception, match="as the test wants it"):
                one.on_device()
            assert one.notes == []
            check_given_back(one)
        check_unharmed(cuda)


def check_memory() -> None:
    with fake_gpu() as cuda:
        with opened_bench(cuda, EXAMPLES["mirrored"], activations=100) as one:
            plans = one.plans("float32", "float16")
            cuda.allocations_left, cuda.recovers = 3, True
            assert_same(one.on_device(), on_cpu("mirrored"))
            assert len(one.notes) == 1
            cuda.peak = 0
            one.on_device(limit=plans[-1].nbytes + 100)
            assert cuda.peak == plans[-1].nbytes
            assert len(one.notes) == 2, "it is float16"
        with opened_bench(cuda, EXAMPLES["mirrored"], activations=100) as one:
            cuda.memory, cuda.peak = plans[0].nbytes + 99, 0
            one.on_device()
            assert cuda.peak == plans[1].nbytes
        check_unharmed(cuda)


def check_given_back(one: Bench) -> None:
    assert one.cuda.live == {}
    assert not any(queue.work for queue in one.cuda.streams.values())


def battery() -> None:
    """Raises where anything is wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtbuild.runtime.gpu.plan.SLAB_BYTES", 2000)
        patch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
        for name in CASES:
            check_labels(name)
        check_logits(LOGITS)
        check_logits(THIN)
        check_nan()
        check_stop()
        check_memory()


def test_without_a_mistake_nothing_is_noticed() -> None:
    battery()


@pytest.mark.parametrize("module", sorted({module for module, _, _ in MUTANTS.values()}))
def test_putting_a_mistake_in_is_none_by_itself(module: str) -> None:
    first = "from __future__ import annotations\n"
    with mutated(module, first, first + "# nothing else\n"):
        check_labels(CASES[0])
        check_stop()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name: str) -> None:
    with mutated(*MUTANTS[name]), pytest.raises((Exception, pytest.fail.Exception)):
        battery()
