"""Engines and timing caches that are kept: found again for the same, never used when damaged, bounded."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graph_samples import floats, model_of, node

import trtbuild.atomic
from trtbuild.cachefolder import Damaged, Foreign, cache_folder, read_kept, write_kept
from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.build import plan_from_onnx
from trtbuild.engine.tensorrt.reuse import (
    EngineKey,
    difference,
    engine_key,
    plan_or_build,
    store_plan,
    stored_plan,
)
from trtbuild.engine.tensorrt.timing import keep_timing_cache, timing_cache
from trtbuild.engine.tensorrt.values import EngineLayer, EngineTable, LayerTensor, Plan
from trtbuild.errors import OutputError
from trtbuild.nvinfer import Features, Nvinfer, nvinfer
from trtbuild.spec import TensorSpec

pytest_plugins = ["cache_samples"]
SHAPES = {"x": ((1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8))}
DEVICE = {"gpu": "NVIDIA H200", "capability": "9.0", "driver": "580.1"}
TENSOR = LayerTensor(name="x", shape=(4, 1, 8, 8), dtype="Half", format="")
LAYER = EngineLayer(name="a", kind="kgen", tactic="t", inputs=(TENSOR,), outputs=(TENSOR,), nodes=("n", "ö\x1e"))
PLAN = Plan(
    content=b"plan" * 1000,
    inputs=(TensorSpec(name="x", dtype="float32", shape=("b", 1, 8, 8)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("b", 2, 8, 8)),),
    table=EngineTable(layers=(LAYER,), activation_memory=1 << 40, weights_memory=None),
    warnings=("slow",),
    seconds=1.5,
)


def flavour(*, timing: bool = False, version: str = "1.7.1", module: Any = None) -> Nvinfer:
    """TensorRT 10 with `timing`, else TensorRT-RTX; nothing of it is loaded."""
    features = Features(
        capabilities=() if timing else ("86",), timing_cache=timing, hardware_compatibility=timing, runtime_cache=False
    )
    backend: Any = "tensorrt" if timing else "tensorrt-rtx"
    name = f"{backend}-{version.partition('.')[0]}"
    return Nvinfer(backend=backend, module=module, version=version, flavour=name, features=features)


def key(model: bytes = b"onnx", *, device: Mapping[str, str] = DEVICE, **config: Any) -> EngineKey:
    return engine_key(model, TensorRTConfig(**config), flavour(), SHAPES, device)


class Builds:
    """A builder that counts."""

    def __init__(self, plan: Plan = PLAN) -> None:
        self.plan, self.calls = plan, list[dict[str, Any]]()

    def __call__(self, model: bytes, **given: Any) -> Plan:
        self.calls.append(given)
        return self.plan


def made(builds: Callable[..., Plan], lines: list[str], model: bytes = b"onnx", **more: Any) -> Plan:
    given: dict[str, Any] = {
        "name": "net", "nvinfer": flavour(), "config": TensorRTConfig(), "shapes": SHAPES, "device": DEVICE,
        "tell": lambda phase, done: None, "report": lines.append, "build": builds, **more,
    }  # fmt: skip
    return plan_or_build(model, **given)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# the folder


def test_the_folder_is_private_and_where_the_user_says(cache: Path) -> None:
    folder = cache_folder("engines")
    assert folder == cache / "engines"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, folder)] == [0o700, 0o700]


def test_without_a_wish_it_is_in_the_cache_of_the_desktop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRTBUILD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("timing") == tmp_path / "xdg" / "trtbuild" / "timing"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("timing") == tmp_path / "home" / ".cache" / "trtbuild" / "timing"


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/trtbuild"])
def test_a_folder_that_cannot_be_used_names_the_way_out(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "engines").write_text("")
    paths = {"a file": tmp_path / "with", "below a file": tmp_path / "file" / "x", "/proc/trtbuild": Path(place)}
    monkeypatch.setenv("TRTBUILD_CACHE", str(paths[place]))
    with pytest.raises(OutputError, match="TRTBUILD_CACHE") as caught:
        made(Builds(), [])
    assert isinstance(caught.value.__cause__, OSError)


def test_without_a_home_folder_the_variable_is_named(homeless: None) -> None:
    with pytest.raises(OutputError, match="TRTBUILD_CACHE") as caught:
        made(Builds(), [])
    assert "home" in str(caught.value.got)


def test_a_folder_of_another_user_is_not_used(cache: Path, foreign: Callable[[Path], None]) -> None:
    """Who owns the folder can put an engine into it, and an engine is code."""
    foreign(cache_folder("engines"))
    with pytest.raises(OutputError, match="belongs to another user") as caught:
        made(Builds(), [])
    assert caught.value.where == cache / "engines"
    assert "TRTBUILD_CACHE" in str(caught.value.hint)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used(mode: int) -> None:
    folder = cache_folder("engines")
    folder.chmod(mode)
    with pytest.raises(OutputError, match="others may write to it") as caught:
        made(Builds(), [])
    assert "chmod go-w" in str(caught.value.hint)
    folder.chmod(0o755)
    assert cache_folder("engines") == folder


# kept files


@pytest.mark.parametrize("mask", [0, 0o002, 0o022, 0o077])
def test_nobody_else_can_write_to_a_kept_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_kept(tmp_path / "f", {}, b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600
    assert read_kept(tmp_path / "f")[1] == b"content"


def test_a_file_that_others_may_write_to_is_built_again(cache: Path) -> None:
    builds, lines = Builds(), list[str]()
    made(builds, lines)
    (file,) = (cache / "engines").glob("*.kept")
    for mode in (0o620, 0o602):
        file.chmod(mode)
        assert made(builds, lines) == PLAN
        assert "others may write to it" in lines[-2]
    assert len(builds.calls) == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_engine_that_another_user_planted_is_neither_used_nor_removed(
    cache: Path, foreign: Callable[[Path], None]
) -> None:
    builds, lines = Builds(), list[str]()
    store_plan(cache_folder("engines"), key(), replace(PLAN, content=b"planted"), name="net")
    (file,) = (cache / "engines").glob("*.kept")
    planted = file.read_bytes()
    foreign(file)
    for _ in range(2):
        lines.clear()
        assert made(builds, lines) == PLAN
        assert "is not yours" in lines[0]
        assert str(file) in lines[0]
        assert "changed since" not in lines[1], "its facts say nothing either"
        assert "is not kept for the next time" in lines[-1]
    assert len(builds.calls) == 2
    assert file.read_bytes() == planted
    store_plan(cache_folder("engines"), key(b"other"), PLAN, name="net", limit=1)
    assert file.read_bytes() == planted, "what is not ours does not go for its age either"


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_what_is_no_file_is_neither_followed_nor_waited_for(what: str, cache: Path, tmp_path: Path) -> None:
    builds, lines = Builds(), list[str]()
    made(builds, lines)
    (file,) = (cache / "engines").glob("*.kept")
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    if what == "link":
        file.symlink_to(elsewhere)
    else:
        os.mkfifo(file)
    with pytest.raises(Foreign):
        read_kept(file)
    assert made(builds, lines, config=TensorRTConfig(verbose=True)) == PLAN
    assert len(builds.calls) == 2


def test_a_file_whose_time_cannot_be_set_is_used_all_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds, lines = Builds(), list[str]()
    made(builds, lines)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "utime", refuse)
    assert made(builds, lines) == PLAN
    assert len(builds.calls) == 1
    assert lines[-1].startswith("reusing the engine")


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kept(tmp_path / "f", {"a": "x" * 200}, b"content")
    monkeypatch.setattr("trtbuild.cachefolder.MAX_HEADER", 200)
    with pytest.raises(Damaged, match="does not begin"):
        read_kept(tmp_path / "f")


def write_header(file: Path, header: bytes) -> None:
    """A header with the right length and sum, whatever it says."""
    file.write_bytes(b"trtbuild-cache 1 %d %s\n%s" % (len(header), hashlib.sha256(header).hexdigest().encode(), header))


@pytest.mark.parametrize(
    "header",
    [b"[]", b"1", b"{}", b"no JSON", b"\xff", b"[" * 100_000, b'{"size": 0}', b'{"size": 0, "sha256": 1, "facts": {}}',
     b'{"size": "0", "sha256": "", "facts": {}}', b'{"size": 0, "sha256": "", "facts": []}'],
    ids=str,
)  # fmt: skip
def test_an_odd_header_is_damage_and_breaks_no_other_build(header: bytes, cache: Path) -> None:
    builds, lines = Builds(), list[str]()
    made(builds, lines)
    (file,) = (cache / "engines").glob("*.kept")
    write_header(cache / "engines" / "odd.kept", header)
    with pytest.raises(Damaged):
        read_kept(cache / "engines" / "odd.kept")
    made(builds, lines, config=TensorRTConfig(workspace=7))
    assert lines[-1].endswith("workspace: default -> 7")
    write_header(file, header)
    made(builds, lines)
    assert "damaged" in lines[-2]
    assert len(builds.calls) == 3


def _facts(**changes: Any) -> dict[str, Any]:
    return {"key": key().facts, "name": "net", "built": 5e9, **changes}


@pytest.mark.parametrize(
    "facts",
    [
        {}, _facts(key=None), _facts(key=[1]), _facts(key={"format": 1}), _facts(key={**key().facts, "onnx": 1}),
        _facts(key={**key().facts, "config": {"a": {"b": 1}}}), _facts(key={**key().facts, "shapes": {"x": 1}}),
        _facts(key={**key().facts, "shapes": {"x": ["1", "2"]}}), _facts(key={**key().facts, "flavour": None}),
        _facts(key={**key().facts, "device": [1]}), _facts(key={**key().facts, "more": 1}),
        _facts(key={**key().facts, "format": 2}), _facts(built=None), _facts(built="1"), _facts(built=float("nan")),
        _facts(built=1e300), _facts(built=-1.0), _facts(name=None), _facts(name=["net"]),
    ],
    ids=lambda facts: json.dumps(facts)[-60:],
)  # fmt: skip
def test_odd_facts_of_a_neighbour_break_no_build(facts: dict[str, Any], cache: Path) -> None:
    builds, lines = Builds(), list[str]()
    made(builds, lines)
    write_kept(cache / "engines" / "odd.kept", facts, b"")
    made(builds, lines, config=TensorRTConfig(workspace=7))
    assert lines[-1] == "building the engine of net: changed since the last one: workspace: default -> 7"


@pytest.mark.parametrize("change", [{"built": "x"}, {"built": 1e300}, {"seconds": 10**400}, {"seconds": None},
                                    {"warnings": 1}])  # fmt: skip
def test_odd_facts_of_the_engine_itself_are_damage(change: dict[str, Any], cache: Path) -> None:
    builds, lines = Builds(), list[str]()
    made(builds, lines)
    (file,) = (cache / "engines").glob("*.kept")
    facts, content = read_kept(file)
    write_kept(file, {**facts, **change}, content)
    assert made(builds, lines) == PLAN
    assert "damaged" in lines[1]
    assert len(builds.calls) == 2


def test_a_kept_file_gives_back_what_was_written(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    write_kept(tmp_path / "f", {"a": [1, "ö"]}, content)
    assert read_kept(tmp_path / "f") == ({"a": [1, "ö"]}, content)


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_kept(file, {"a": 1}, b"some content")
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read_kept(file)
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(Damaged):
            read_kept(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(Damaged):
        read_kept(file)


# the key


def test_every_part_of_the_key_counts() -> None:
    others = [
        key(b"another"),
        key(device={**DEVICE, "gpu": "NVIDIA A100"}),
        key(workspace=512),
        key(optimization_level=5),
        key(tf32=True),
        key(sparsity=True),
        key(compute_capabilities=("86",)),
        key(hardware_compatibility="ampere+"),
        key(version_compatible=True),
        key(weight_streaming=True),
        key(strip_plan=True),
        key(refit=True),
        replace(key(), version="1.7.2"),
        replace(key(), flavour="tensorrt-rtx-2"),
        engine_key(b"onnx", TensorRTConfig(), flavour(), {"x": ((1, 1, 8, 8),) * 3}, DEVICE),
        engine_key(b"onnx", TensorRTConfig(), flavour(), {"z": SHAPES["x"]}, DEVICE),
    ]
    assert len({key().digest, *(other.digest for other in others)}) == 1 + len(others)


def test_what_changes_no_engine_changes_no_key() -> None:
    alike = [
        key(verbose=True),
        key(timing_cache=False),
        key(max_batch=9),  # the shapes say it
        key(device={"driver": "590", "capability": "9.0", "gpu": "NVIDIA H200"}),
    ]
    assert {other.digest for other in alike} == {key().digest}
    capabilities = [key(compute_capabilities=order).digest for order in (("86", "89"), ("89", "86"))]
    assert capabilities[0] == capabilities[1]


def test_the_key_is_the_same_in_every_process() -> None:
    code = "import test_tensorrt_reuse as t; print(t.key(workspace=3).digest)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == key(workspace=3).digest


# engines


def test_an_engine_comes_back_as_it_was(cache: Path) -> None:
    folder = cache_folder("engines")
    assert stored_plan(folder, key()) is None
    store_plan(folder, key(), PLAN, name="net")
    assert stored_plan(folder, key()) == PLAN
    store_plan(folder, key(b"bare"), replace(PLAN, table=None), name="net")
    found = stored_plan(folder, key(b"bare"))
    assert found is not None
    assert found.table is None


def test_the_same_again_is_not_built_again() -> None:
    builds, lines = Builds(), list[str]()
    assert made(builds, lines) == PLAN
    assert made(builds, lines) == PLAN
    assert len(builds.calls) == 1
    assert lines[0] == "building the engine of net"
    assert lines[1].startswith("reusing the engine of net, built 2")


def test_what_changed_is_named() -> None:
    builds, lines = Builds(), list[str]()
    rtx, config = flavour(version="1.6.1"), TensorRTConfig(workspace=512)
    made(builds, lines, b"old", nvinfer=rtx, config=config, device={"capabilities": "86"})
    shapes = {"x": ((1, 1, 8, 8), (2, 1, 8, 8), (8, 1, 8, 8))}
    config = TensorRTConfig(workspace=1024, tf32=True)
    made(builds, lines, b"new", shapes=shapes, config=config, device={"capabilities": "86,89"})
    assert lines[1] == (
        "building the engine of net: changed since the last one: the network (its ONNX); "
        "TensorRT-RTX 1.6.1 -> TensorRT-RTX 1.7.1; tf32: off -> on; workspace: 512 -> 1024; "
        "shapes of x: 1x1x8x8 2x1x8x8 4x1x8x8 -> 1x1x8x8 2x1x8x8 8x1x8x8; capabilities: 86 -> 86,89"
    )


def test_the_newest_engine_of_the_same_name_is_compared(cache: Path) -> None:
    folder = cache_folder("engines")
    for model, workspace, name in ((b"1", 1, "net"), (b"2", 2, "net"), (b"3", 3, "other")):
        store_plan(folder, key(model, workspace=workspace), PLAN, name=name)
    assert difference(folder, key(b"2", workspace=4), "net") == ("workspace: 2 -> 4",)
    assert difference(folder, key(b"2"), "net") == ("workspace: 2 -> default",)
    assert difference(folder, key(), "unknown") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x80\x04garbage" * 99),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:300]),
        lambda file: file.write_bytes(file.read_bytes()[:-9] + b"x" + file.read_bytes()[-8:]),
        lambda file: write_kept(file, {"key": key().facts, "format": 0}, b"plan"),
        lambda file: write_kept(file, {**read_kept(file)[0], "inputs": [{"name": 1}]}, b"plan"),
        lambda file: write_kept(file, {**read_kept(file)[0], "table": {"layers": "x"}}, b"plan"),
        lambda file: write_kept(file, {**read_kept(file)[0], "key": key(b"another").facts}, b"plan"),
        lambda file: write_kept(file, {}, b"plan"),
    ],
    ids=["empty", "garbage", "cut", "cut in the header", "changed", "old", "inputs", "table", "other key", "no facts"],
)
def test_a_damaged_engine_is_reported_and_built_again(damage: Callable[[Path], Any], cache: Path) -> None:
    builds, lines = Builds(), list[str]()
    made(builds, lines)
    (file,) = (cache / "engines").glob("*.kept")
    damage(file)
    assert made(builds, lines) == PLAN
    assert len(builds.calls) == 2
    assert any("damaged" in line and file.name in line for line in lines)
    assert made(builds, lines) == PLAN
    assert len(builds.calls) == 2, "the new one was kept"


def test_an_engine_that_cannot_be_removed_is_not_used_either(cache: Path) -> None:
    builds, lines = Builds(), list[str]()
    (cache_folder("engines") / f"{key().digest}.kept").mkdir()
    assert made(builds, lines) == PLAN
    assert "damaged" in lines[0]
    assert "is not kept for the next time" in lines[-1]


def test_damaged_neighbours_do_not_hide_what_changed(cache: Path) -> None:
    builds, lines = Builds(), list[str]()
    made(builds, lines)
    (cache / "engines" / "0.kept").write_bytes(b"garbage")
    write_kept(cache / "engines" / "1.kept", {"name": "net"}, b"")
    made(builds, lines, config=TensorRTConfig(workspace=7))
    assert lines[-1].endswith("workspace: default -> 7")


def test_a_full_disk_loses_no_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trtbuild.atomic.os, "replace", full)
    lines: list[str] = []
    assert made(Builds(), lines) == PLAN
    assert "the engine of net is not kept for the next time" in lines[-1]
    assert "No space left" in lines[-1]
    assert not list((cache / "engines").iterdir())


def test_a_build_that_is_stopped_keeps_nothing(cache: Path) -> None:
    def stopped(model: bytes, **given: Any) -> Plan:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(stopped, [])
    assert not list((cache / "engines").iterdir())


def test_the_folder_is_bounded_and_what_was_used_last_stays(cache: Path) -> None:
    folder = cache_folder("engines")
    keys = [key(bytes([number])) for number in range(4)]
    for number, one in enumerate(keys[:3]):
        store_plan(folder, one, PLAN, name="net")
        os.utime(folder / f"{one.digest}.kept", (number, number))
    assert stored_plan(folder, keys[0]) is not None  # now used later than the second and third
    size = (folder / f"{keys[0].digest}.kept").stat().st_size
    store_plan(folder, keys[3], PLAN, name="net", limit=2 * size + size // 2)
    assert [stored_plan(folder, one) is not None for one in keys] == [True, False, False, True]
    store_plan(folder, keys[1], PLAN, name="net", limit=1)
    assert [stored_plan(folder, one) is not None for one in keys] == [False, True, False, False]


@pytest.mark.parametrize("part", ["engines", "timing"])
def test_what_killed_processes_left_goes(part: str, cache: Path) -> None:
    folder = cache_folder(part)
    stray = folder / ".trtbuild-x.partial.kept"
    stray.write_bytes(b"half an eng")
    made(Builds(replace(PLAN, timing_cache=b"a")), [], nvinfer=tensorrt())
    assert not stray.exists()


def _in_two_processes(work: Callable[[int, int, Any], None], rounds: int) -> Any:
    """Runs `work` with the numbers 1 and 2 at once, in fresh processes; gives what they reported."""
    context = multiprocessing.get_context("spawn")
    lines = context.Queue()
    workers = [context.Process(target=work, args=(number, rounds, lines)) for number in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return lines


def _write_and_read(number: int, rounds: int, lines: Any) -> None:
    folder = cache_folder("engines")
    plan = replace(PLAN, content=bytes([number]) * (200_000 + number))
    for turn in range(rounds):
        store_plan(folder, key(bytes([turn % 3])), plan, name="net", limit=500_000)
        found = stored_plan(folder, key(bytes([turn % 3])), lines.put)
        if found is not None and len(set(found.content)) != 1:
            lines.put("a mixed engine")


def test_what_another_process_is_writing_is_left_alone(cache: Path) -> None:
    folder = cache_folder("engines")
    with trtbuild.atomic.whole_file(folder / "0.kept") as partial:
        partial.write_bytes(b"half an eng")
        store_plan(folder, key(), PLAN, name="net", limit=1)
        assert difference(folder, key(workspace=1), "net") == ("workspace: default -> 1",)
        assert partial.exists()


def test_two_processes_at_once_never_see_half_an_engine() -> None:
    assert _in_two_processes(_write_and_read, 30).empty()
    files = list(cache_folder("engines").iterdir())
    assert files
    assert {path.suffix for path in files} == {".kept"}


def test_a_real_engine_is_reused() -> None:
    flavour, lines, built = nvinfer("tensorrt-rtx"), list[str](), list[Plan]()

    def build(model: bytes, **more: Any) -> Plan:
        built.append(plan_from_onnx(model, **more))
        return built[-1]

    shape = (4, 16, 16)
    conv = node("Conv", "image w", "y", "conv", pads=[1, 1, 1, 1])
    network = model_of([conv], {"image": ("b", *shape)}, {"y": ("b", *shape)}, {"w": floats(4, 4, 3, 3)})
    given: dict[str, Any] = {
        "name": "net", "nvinfer": flavour, "config": TensorRTConfig(), "device": {"capabilities": "all"},
        "shapes": {"image": ((1, *shape), (1, *shape), (2, *shape))}, "tell": lambda phase, done: None,
        "report": lines.append, "build": build,
    }  # fmt: skip
    model = network.SerializeToString()
    first, second = plan_or_build(model, **given), plan_or_build(model, **given)
    assert second == first
    assert len(built) == 1
    assert first.table is not None
    assert first.table.layers
    plan_or_build(model, **{**given, "config": TensorRTConfig(optimization_level=2)})
    assert len(built) == 2
    assert [line.split(" of net")[0] for line in lines] == ["building the engine", "reusing the engine",
                                                            "building the engine"]  # fmt: skip
    assert lines[2].endswith("optimization level: 3 -> 2")


# timing caches


class Cache:
    """TensorRT's ITimingCache with sets of bytes; "foreign" ones do not go together with others."""

    def __init__(self, content: bytes) -> None:
        self.entries = set(content.split())

    def combine(self, input_cache: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if b"foreign" in input_cache.entries:
            return False
        self.entries |= input_cache.entries
        return True

    def serialize(self) -> bytes | None:
        return None if b"huge" in self.entries else b" ".join(sorted(self.entries))


def tensorrt(version: str = "10.16") -> Nvinfer:
    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            assert severity == self.ERROR

    config = SimpleNamespace(create_timing_cache=Cache)
    builder = SimpleNamespace(create_builder_config=lambda: config)
    return flavour(timing=True, version=version, module=SimpleNamespace(Logger=Logger, Builder=lambda logger: builder))


def kept(trt: Nvinfer, content: bytes, known: bytes, lines: list[str], device: Mapping[str, str] = DEVICE) -> None:
    keep_timing_cache(trt, TensorRTConfig(), device, replace(PLAN, timing_cache=content), known, lines.append)


def test_a_timing_cache_goes_to_the_next_build_of_this_gpu_and_version() -> None:
    builds, lines = Builds(replace(PLAN, timing_cache=b"a b")), list[str]()
    for model in (b"1", b"2"):
        made(builds, lines, model, nvinfer=tensorrt())
    made(builds, lines, b"3", nvinfer=tensorrt("10.17"))
    made(builds, lines, b"4", nvinfer=tensorrt(), device={**DEVICE, "gpu": "NVIDIA A100"})
    made(builds, lines, b"5", nvinfer=tensorrt(), config=TensorRTConfig(timing_cache=False))
    assert [call["timing_cache"] for call in builds.calls] == [b"", b"a b", b"", b"", b""]


def test_tensorrt_rtx_has_no_timing_cache(cache: Path) -> None:
    builds, lines = Builds(replace(PLAN, timing_cache=b"a")), list[str]()
    made(builds, lines)
    made(builds, lines, b"2")
    assert [call["timing_cache"] for call in builds.calls] == [b"", b""]
    assert not (cache / "timing").exists()


def test_what_another_process_measured_in_the_meantime_is_merged() -> None:
    lines: list[str] = []
    kept(tensorrt(), b"a b", b"", lines)
    kept(tensorrt(), b"c", b"", lines)  # began before the first was kept
    assert timing_cache(tensorrt(), TensorRTConfig(), DEVICE, lines.append) == b"a b c"
    kept(tensorrt(), b"a b c d", b"a b c", lines)
    assert timing_cache(tensorrt(), TensorRTConfig(), DEVICE, lines.append) == b"a b c d"
    assert not lines


def test_timing_caches_that_tensorrt_does_not_write_as_one_are_replaced_and_it_is_said() -> None:
    lines: list[str] = []
    kept(tensorrt(), b"huge", b"", lines)
    kept(tensorrt(), b"b", b"", lines)
    assert timing_cache(tensorrt(), TensorRTConfig(), DEVICE, lines.append) == b"b"
    assert lines == ["TensorRT does not write the timing caches as one; the kept one is replaced"]


def _measure(number: int, rounds: int, lines: Any) -> None:
    known = b""
    for turn in range(rounds):
        kept(tensorrt(), known + b" %d-%d" % (number, turn), known, [])
        known = timing_cache(tensorrt(), TensorRTConfig(), DEVICE, lines.put)


def test_two_processes_lose_nothing_that_they_measured() -> None:
    lines = _in_two_processes(_measure, 20)
    assert lines.empty()
    found = timing_cache(tensorrt(), TensorRTConfig(), DEVICE, pytest.fail)
    assert set(found.split()) == {b"%d-%d" % (number, turn) for number in (1, 2) for turn in range(20)}


def test_the_logger_of_a_merge_stays() -> None:
    """TensorRT writes to the first logger of a process as long as that lives."""
    trt, made = tensorrt(), list[Any]()
    usual = trt.module.Logger

    def logger(severity: int) -> Any:
        one = usual(severity)
        made.append(weakref.ref(one))
        return one

    logger.ERROR = usual.ERROR  # type: ignore[attr-defined]
    trt.module.Logger = logger
    kept(trt, b"a", b"", [])
    kept(trt, b"b", b"", [])
    gc.collect()
    assert len(made) == 1
    assert made[0]() is not None


def test_a_cache_that_tensorrt_refuses_is_replaced_and_said() -> None:
    lines: list[str] = []
    kept(tensorrt(), b"foreign", b"", lines)
    kept(tensorrt(), b"a", b"", lines)
    assert lines == ["TensorRT does not take the kept timing cache; it is replaced"]
    assert timing_cache(tensorrt(), TensorRTConfig(), DEVICE, lines.append) == b"a"


def test_timing_caches_are_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    for number in range(3):
        kept(tensorrt(f"10.{number}"), b"a" * 1000, b"", lines)
    files = sorted((cache / "timing").glob("*.timing"))
    aside = files[0].with_suffix(".damaged")
    aside.write_bytes(b"damaged" * 200)
    for file in (*files, aside):
        os.utime(file, (1, 1))
    assert timing_cache(tensorrt("10.1"), TensorRTConfig(), DEVICE, lines.append) == b"a" * 1000
    used = {file for file in files if file.stat().st_mtime > 1}
    assert len(used) == 1
    monkeypatch.setattr("trtbuild.engine.tensorrt.timing.LIMIT", 2 * files[0].stat().st_size)
    kept(tensorrt("10.3"), b"a" * 1000, b"", lines)
    left = set((cache / "timing").iterdir())
    assert len(left) == 2
    assert used < left
    assert aside not in left
    assert not lines


def test_a_timing_cache_of_another_user_stays_where_it_is(cache: Path, foreign: Callable[[Path], None]) -> None:
    lines: list[str] = []
    kept(tensorrt(), b"a", b"", lines)
    (file,) = (cache / "timing").glob("*.timing")
    planted = file.read_bytes()
    foreign(file)
    builds = Builds(replace(PLAN, timing_cache=b"b"))
    for _ in range(2):
        made(builds, lines, nvinfer=tensorrt())
    assert [call["timing_cache"] for call in builds.calls] == [b""], "and the engine is kept all the same"
    assert any("is not yours" in line for line in lines)
    assert file.read_bytes() == planted


def test_a_damaged_timing_cache_is_set_aside(cache: Path) -> None:
    lines: list[str] = []
    kept(tensorrt(), b"a", b"", lines)
    (file,) = (cache / "timing").glob("*.timing")
    file.write_bytes(file.read_bytes()[:-1])
    damaged = file.read_bytes()
    assert timing_cache(tensorrt(), TensorRTConfig(), DEVICE, lines.append) == b""
    assert "damaged" in lines[0]
    assert file.with_suffix(".damaged").read_bytes() == damaged
    kept(tensorrt(), b"b", b"", lines)
    assert timing_cache(tensorrt(), TensorRTConfig(), DEVICE, lines.append) == b"b"
    assert len(lines) == 1
