"""nnU-Net's post-processing: read from its files without running them, and done as nnU-Net does it."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing,
    remove_all_but_largest_component_from_segmentation,
)
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from trtbuild.errors import ModelError, Untrusted
from trtbuild.spec import KeepLargestComponent
from trtbuild.volume.postprocessing import postprocessed, postprocessing_bytes, postprocessing_from_file

FUNCTION = remove_all_but_largest_component_from_segmentation
KWARGS: list[dict[str, Any]] = [
    {"labels_or_regions": [np.int64(1), np.int64(2), np.int64(300)]},
    {"labels_or_regions": np.int64(2)},
    {"labels_or_regions": (1, 2)},
    {"labels_or_regions": [(1, 2, 3), 3, (1,)]},
    {"labels_or_regions": 7, "background_label": 1},
    {"labels_or_regions": []},
]
STEPS = (
    KeepLargestComponent(labels=(1, 2, 300)),
    KeepLargestComponent(labels=(2,)),
    KeepLargestComponent(labels=(1, 2)),
    KeepLargestComponent(labels=(1, 2, 3)),
    KeepLargestComponent(labels=(7,), background=1),
    KeepLargestComponent(labels=()),
)


def pickled(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "postprocessing.pkl"
    path.write_bytes(content)
    return path


def as_json(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "postprocessing.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_every_protocol_holds_the_same_steps(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(([FUNCTION] * len(KWARGS), KWARGS), protocol=protocol)
    assert postprocessing_from_file(pickled(tmp_path, content)) == STEPS


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_pure_python_pickler_and_pickletools_write_what_is_read_too(tmp_path: Path, protocol: int) -> None:
    value = ([FUNCTION] * len(KWARGS), KWARGS)
    assert postprocessing_from_file(pickled(tmp_path, pickle._dumps(value, protocol=protocol))) == STEPS  # type: ignore[attr-defined]
    optimised = pickletools.optimize(pickle.dumps(value, protocol=protocol))
    assert postprocessing_from_file(pickled(tmp_path, optimised)) == STEPS


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_numpy_1_is_read_and_so_is_every_kind_of_whole_number(tmp_path: Path, protocol: int) -> None:
    labels = [np.dtype(f"{order}{kind}{size}").type(5) for order in "<>" for kind in "iu" for size in (1, 2, 4, 8)]
    labels += [np.array([258], ">i4")[0], np.array([260], ">u2")[0]]
    content = pickle.dumps(([FUNCTION], [{"labels_or_regions": labels}]), protocol=protocol)
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    if protocol == 4:  # the lengths of the text and of the frame
        old = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        old = old[:3] + struct.pack("<Q", len(old) - 11) + old[11:]
        pickle.loads(old)
    expected = (KeepLargestComponent(labels=(5, 258, 260)),)
    assert postprocessing_from_file(pickled(tmp_path, content)) == expected
    assert postprocessing_from_file(pickled(tmp_path, old)) == expected


def test_a_big_endian_dtype_keeps_its_order_when_it_comes_from_the_memo(tmp_path: Path) -> None:
    class BigEndian:
        """A scalar as a big-endian machine pickles it; twice, so that the second takes the dtype from the memo."""

        dtype = np.dtype(">i8")

        def __init__(self, value: int) -> None:
            self.value = value

        def __reduce__(self) -> Any:
            return np._core.multiarray.scalar, (self.dtype, self.value.to_bytes(8, "big"))

    content = pickle.dumps(([FUNCTION], [{"labels_or_regions": [BigEndian(3), BigEndian(4)]}]))
    assert pickle.loads(content)[1] == [{"labels_or_regions": [3, 4]}]
    assert postprocessing_from_file(pickled(tmp_path, content)) == (KeepLargestComponent(labels=(3, 4)),)


def test_the_json_that_nnunet_writes_holds_the_same_steps_as_its_pickle(tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "input_folder": {"foreground_mean": {"Dice": float("nan")}},
        "postprocessing_fns": [FUNCTION.__name__] * len(KWARGS),
        "postprocessing_kwargs": [dict(kwargs) for kwargs in KWARGS],
    }
    recursive_fix_for_json_export(report)
    assert postprocessing_from_file(as_json(tmp_path, report)) == STEPS


class Call:
    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.made


def hostile(name: str, marker: Path) -> Any:
    step = {"labels_or_regions": 1}
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": ([Call(os.system, f"touch {marker}")], [step]),
        "eval": ([FUNCTION], [{"labels_or_regions": Call(builtins.eval, touch)}]),
        "nested": Call(tuple, [Call(builtins.exec, touch)]),
        "getattr": ([Call(getattr, os, "system")], [step]),
        "state": ([FUNCTION], [{"labels_or_regions": Call(Exception, state={"a": 1})}]),
        "class": ([Call], [step]),
        "float": ([FUNCTION], [{"labels_or_regions": 1.5}]),
        "set": ([FUNCTION], [{"labels_or_regions": {1, 2}}]),
        "array": ([FUNCTION], [{"labels_or_regions": np.arange(3)}]),
        "float scalar": ([FUNCTION], [{"labels_or_regions": np.float64(1)}]),
        "other function": ([apply_postprocessing], [step]),
        "dtype": ([FUNCTION], [{"labels_or_regions": np.dtype([("a", "i4")])}]),
    }[name]


NAMES = ("os.system", "eval", "nested", "getattr", "state", "class", "float", "set", "array", "float scalar",
         "other function", "dtype")  # fmt: skip


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    tmp_path: Path, name: str, protocol: int
) -> None:
    if name == "getattr":
        content = b"cos\nsystem\n."
    else:
        content = pickle.dumps(hostile(name, tmp_path / "ran"), protocol=protocol)
    with pytest.raises(Untrusted) as caught:
        postprocessing_from_file(pickled(tmp_path, content))
    assert not (tmp_path / "ran").exists()
    assert str(tmp_path / "postprocessing.pkl") in str(caught.value)


def test_the_refusal_names_the_global_and_the_opcode(tmp_path: Path) -> None:
    with pytest.raises(Untrusted, match=r"(posix|nt) system"):
        postprocessing_from_file(pickled(tmp_path, pickle.dumps(Call(os.system, "true"))))
    with pytest.raises(Untrusted, match="opcode BINFLOAT"):
        postprocessing_from_file(pickled(tmp_path, pickle.dumps(([FUNCTION], [{"labels_or_regions": 0.5}]))))
    for opcode, name in ((b"\x82\x01", "EXT1"), (b"P1\n", "PERSID"), (b"Q", "BINPERSID"), (b"\x81", "NEWOBJ"),
                         (b"i__main__\nx\n", "INST"), (b"o", "OBJ"), (b"2", "DUP"), (b"0", "POP")):  # fmt: skip
        with pytest.raises(Untrusted, match=f"opcode {name}"):
            postprocessing_from_file(pickled(tmp_path, b"\x80\x04" + opcode + b"."))


NUMPY_CALLS = {
    "a dtype of objects": b"cnumpy\ndtype\n(VO8\nI00\nI01\ntR.",
    "a scalar with too few bytes": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(Vi8\nI00\nI01\ntR"
    b"c_codecs\nencode\n(Vabc\nVlatin1\ntRtR.",
    "another encoding": b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
    "a dtype with fields": b"cnumpy\ndtype\n(Vi8\nI00\nI01\ntR(I3\nV<\nN(dNI-1\nI-1\nI0\ntb.",
    "a call of a number": b"I1\n(tR.",
    "nnU-Net's function called": b"cnnunetv2.postprocessing.remove_connected_components\n"
    b"remove_all_but_largest_component_from_segmentation\n(tR.",
}  # fmt: skip


@pytest.mark.parametrize("name", NUMPY_CALLS)
def test_of_calls_only_those_that_spell_whole_numbers_pass(tmp_path: Path, name: str) -> None:
    with pytest.raises(Untrusted):
        postprocessing_from_file(pickled(tmp_path, NUMPY_CALLS[name]))


def test_a_truncated_pickle_is_damaged_at_every_length(tmp_path: Path) -> None:
    for protocol in (0, 2, 4):
        content = pickle.dumps(([FUNCTION] * len(KWARGS), KWARGS), protocol=protocol)
        for length in range(len(content)):
            with pytest.raises(ModelError):
                postprocessing_from_file(pickled(tmp_path, content[:length]))
        with pytest.raises(ModelError, match="left over"):
            postprocessing_from_file(pickled(tmp_path, content + b"."))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_the_bytes_are_the_answer_is_steps_or_an_error_for_the_user(data: st.DataObject) -> None:
    import tempfile

    content = bytearray(pickle.dumps(([FUNCTION], [{"labels_or_regions": [np.int64(1), (2, 3)]}]), protocol=4))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        path = pickled(Path(folder), bytes(content) + data.draw(st.sampled_from([b"", b"."])))
        try:
            steps = postprocessing_from_file(path)
        except ModelError:
            return
    assert all(isinstance(step, KeepLargestComponent) for step in steps)


def test_a_pickle_that_unfolds_from_its_memo_is_refused_in_little_memory_and_time(tmp_path: Path) -> None:
    one_region = tuple([1] * 60_000)
    content = pickle.dumps(([FUNCTION], [{"labels_or_regions": [one_region] * 60_000}]))
    assert len(content) < 1 << 20
    tracemalloc.start()
    with pytest.raises(ModelError, match="more labels"):
        postprocessing_from_file(pickled(tmp_path, content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_list_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ModelError, match="label"):
        postprocessing_from_file(pickled(tmp_path, pickle.dumps(([FUNCTION], [{"labels_or_regions": endless}]))))
    laughs: Any = 1
    for _ in range(40):
        laughs = (laughs, laughs)
    with pytest.raises(ModelError):
        postprocessing_from_file(pickled(tmp_path, pickle.dumps(laughs)))


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name, size in (("postprocessing.pkl", 1 << 40), ("postprocessing.json", 1 << 40)):
        path = tmp_path / name
        with path.open("wb") as stream:
            stream.truncate(size)
        tracemalloc.start()
        with pytest.raises(ModelError, match="larger than any real one"):
            postprocessing_from_file(path)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
        tracemalloc.stop()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"labels_or_regions": 1, "min_size": 3},
        {"labels_or_regions": "1"},
        {"labels_or_regions": True},
        {"labels_or_regions": -1},
        {"labels_or_regions": 65536},
        {"labels_or_regions": [[[1]]]},
        {"labels_or_regions": None},
        {"labels_or_regions": 1, "background_label": None},
        [],
    ],
)
def test_arguments_that_nnunet_does_not_write_are_refused(tmp_path: Path, kwargs: Any) -> None:
    with pytest.raises(ModelError):
        postprocessing_from_file(pickled(tmp_path, pickle.dumps(([FUNCTION], [kwargs]))))
    report = {"postprocessing_fns": [FUNCTION.__name__], "postprocessing_kwargs": [kwargs]}
    with pytest.raises(ModelError):
        postprocessing_from_file(as_json(tmp_path, report))


@pytest.mark.parametrize(
    "report",
    [
        [],
        {"postprocessing_fns": []},
        {"postprocessing_fns": [], "postprocessing_kwargs": [{}]},
        {"postprocessing_fns": {}, "postprocessing_kwargs": {}},
        {"postprocessing_fns": ["remove_everything"], "postprocessing_kwargs": [{"labels_or_regions": 1}]},
    ],
)
def test_a_json_of_another_form_is_refused(tmp_path: Path, report: Any) -> None:
    with pytest.raises(ModelError):
        postprocessing_from_file(as_json(tmp_path, report))


def test_a_missing_file_a_broken_json_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        postprocessing_from_file(tmp_path / "postprocessing.pkl")
    (tmp_path / "postprocessing.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="not JSON"):
        postprocessing_from_file(tmp_path / "postprocessing.json")
    with pytest.raises(ModelError, match="no post-processing file"):
        postprocessing_from_file(tmp_path / "summary.txt")


def theirs(segmentation: Any, steps: tuple[KeepLargestComponent, ...]) -> Any:
    kwargs = [{"labels_or_regions": list(step.labels), "background_label": step.background} for step in steps]
    return apply_postprocessing(segmentation, [FUNCTION] * len(steps), kwargs)


def assert_as_nnunet(segmentation: Any, steps: tuple[KeepLargestComponent, ...]) -> None:
    before = segmentation.copy()
    ours = postprocessed(segmentation, steps)
    assert ours.dtype == segmentation.dtype
    assert ours.shape == segmentation.shape
    np.testing.assert_array_equal(ours, theirs(before, steps))
    np.testing.assert_array_equal(segmentation, before)


STEP = st.builds(
    KeepLargestComponent,
    labels=st.lists(st.integers(0, 5), max_size=4, unique=True).map(tuple),
    background=st.integers(0, 3),
)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int16, np.int64]),
    density=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(STEP, max_size=3).map(tuple),
)
def test_segmentations_come_out_as_from_nnunet(
    shape: tuple[int, int, int], dtype: Any, density: float, seed: int, steps: tuple[KeepLargestComponent, ...]
) -> None:
    rng = np.random.default_rng(seed)
    segmentation = (rng.integers(1, 5, shape) * (rng.random(shape) < density)).astype(dtype)
    assert_as_nnunet(segmentation, steps)


def test_components_of_equal_size_all_stay_and_a_smaller_one_goes() -> None:
    segmentation = np.zeros((4, 12, 12), np.uint8)
    segmentation[1:3, 1:3, 1:3] = 1
    segmentation[1:3, 6:8, 6:8] = 1
    segmentation[0, 11, 11] = 1
    ours = postprocessed(segmentation, (KeepLargestComponent(labels=(1,)),))
    assert ours.sum() == 16
    assert_as_nnunet(segmentation, (KeepLargestComponent(labels=(1,)),))


def test_voxels_that_share_only_a_corner_are_one_component() -> None:
    segmentation = np.zeros((6, 6, 6), np.uint8)
    segmentation[range(4), range(4), range(4)] = 1
    segmentation[5, 0, 0:3] = 1
    assert postprocessed(segmentation, (KeepLargestComponent(labels=(1,)),)).sum() == 4
    assert_as_nnunet(segmentation, (KeepLargestComponent(labels=(1,)),))


def test_a_region_is_one_union_and_not_one_label_after_the_other() -> None:
    segmentation = np.zeros((1, 8, 20), np.uint16)
    segmentation[0, 2:4, 0:4], segmentation[0, 2:4, 4:8] = 1, 300
    segmentation[0, 2:5, 12:16] = 300
    union = (KeepLargestComponent(labels=(1, 300)),)
    assert_as_nnunet(segmentation, union)
    assert not (postprocessed(segmentation, union)[0, :, 12:]).any()
    assert_as_nnunet(segmentation, (KeepLargestComponent(labels=(300,)), KeepLargestComponent(labels=(1,))))


def test_a_label_beyond_the_dtype_is_nowhere_and_a_background_beyond_it_is_an_error() -> None:
    segmentation = np.ones((2, 3, 4), np.uint8)
    np.testing.assert_array_equal(postprocessed(segmentation, (KeepLargestComponent(labels=(300,)),)), segmentation)
    with pytest.raises(ModelError, match="does not fit"):
        postprocessed(segmentation, (KeepLargestComponent(labels=(1,), background=300),))


def test_many_slabs_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from trtbuild.volume.postprocessing import components

    monkeypatch.setattr(components, "SLAB", 50)
    rng = np.random.default_rng(3)
    assert_as_nnunet((rng.random((17, 9, 11)) < 0.15).astype(np.uint8), (KeepLargestComponent(labels=(1,)),))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_memory_stays_below_the_stated_bound(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    segmentation = (rng.random((96, 128, 128)) < 0.3).astype(dtype)
    segmentation[0, 0, 0] = segmentation[-1, -1, -1] = 1
    postprocessed(segmentation[:2], (KeepLargestComponent(labels=(1,)),))  # imports
    tracemalloc.start()
    postprocessed(segmentation, (KeepLargestComponent(labels=(1,)),))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    bound = postprocessing_bytes(segmentation.shape, np.dtype(dtype).itemsize)
    assert 0.3 * bound < peak <= bound
