"""Every way in which a bundle can be wrong ends in its own error, which says file, expected, got and next step."""

from __future__ import annotations

import copy
import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from bundle_samples import CONTENTS, FILES, SPEC, read_json, write_json, write_sample

from trtbuild import errors
from trtbuild.bundle import FORMAT, Bundle, open_bundle, verify_bundle
from trtbuild.spec import json_from_value

NETWORK = "networks/fold_0_fp32.onnx"


@pytest.fixture
def sample(tmp_path: Path) -> Bundle:
    return write_sample(tmp_path)


def refused(kind: type[errors.BundleError], path: Path, *words: str) -> errors.BundleError:
    """Opening `path` raises exactly `kind`, with a next step, and `words` in the message."""
    with pytest.raises(errors.BundleError) as caught:
        open_bundle(path)
    assert type(caught.value) is kind, caught.value
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)
    return caught.value


def changed(sample: Bundle, change: Callable[[Any], None]) -> Path:
    data = read_json(sample.path)
    change(data)
    write_json(sample.path, data)
    return sample.path


# ---- what is right


def test_what_is_written_is_what_is_read(sample: Bundle) -> None:
    again = open_bundle(sample.path)
    assert again.manifest.contents == CONTENTS
    assert again == sample
    for name, content in FILES.items():
        assert again.file(name).read_bytes() == content
        assert again.manifest.files[name].size == len(content)
        assert again.manifest.files[name].sha256 == hashlib.sha256(content).hexdigest()
    assert again.network_file("fold_0_fp32").read_bytes() == FILES[NETWORK]
    assert verify_bundle(again) == tuple(sorted(FILES))


def test_the_identity_is_the_hash_of_bundle_json(sample: Bundle) -> None:
    assert sample.identity == hashlib.sha256((sample.path / "bundle.json").read_bytes()).hexdigest()


def test_a_bundle_may_be_reached_through_a_link_and_renamed(sample: Bundle, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(sample.path)
    assert verify_bundle(open_bundle(tmp_path / "current"))
    sample.path.rename(tmp_path / "other name")
    assert open_bundle(tmp_path / "other name").identity == sample.identity


def test_a_bundle_is_frozen(sample: Bundle) -> None:
    with pytest.raises(FrozenInstanceError):
        sample.path = Path("elsewhere")  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        sample.manifest.format = 2  # type: ignore[misc]


def test_an_integer_may_stand_for_a_float_but_for_nothing_else(sample: Bundle) -> None:
    def whole(data: Any) -> None:
        data["stages"][0]["spec"]["spacing"] = [1, 2]

    assert open_bundle(changed(sample, whole)).manifest.stages[0].spec.spacing == (1.0, 2.0)


def test_importing_the_room_loads_nothing_heavy() -> None:
    heavy = "pydantic torch onnx onnxruntime openvino scipy numba numpy SimpleITK nibabel"
    code = f"import sys, trtbuild.bundle; print([name for name in {heavy.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['numpy']")


# ---- no bundle at all


def test_a_path_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "empty.trtb").mkdir()
    (tmp_path / "file.trtb").write_bytes(b"PK\3\4")
    for name in ("nothing.trtb", "empty.trtb", "file.trtb", "no/such/folder.trtb", "file.trtb/inside.trtb", "a\0b"):
        refused(errors.BundleMissing, tmp_path / name, "trtbuild compile MODEL_FOLDER -o NAME.trtb")


def test_bundle_json_may_be_neither_link_nor_pipe(sample: Bundle, tmp_path: Path) -> None:
    file = sample.path / "bundle.json"
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    refused(errors.BundlePath, sample.path, "bundle.json")
    file.unlink()
    os.mkfifo(file)
    refused(errors.BundlePath, sample.path, "bundle.json")


# ---- not JSON, or another format


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe", b"\x80", b"{", b"{}", b"[]", b"null", b"3", b'"format"', b"\xef\xbb\xbf{}", b"{'format': 1}",
     b'{"format": 1,}', b'{"format": 1} {}', b'{"format": 1, "x": NaN}', b'{"format": 1, "x": -Infinity}',
     b'{"format": 1, "x": 1e999}', b'{"format": 1, "x": "\\ud800"}', b'{"format": 1, "\\udfff": 0}',
     b'{"format": 1, "x": 01}', b'{"format": 1, "x": "\x01"}'],
)  # fmt: skip
def test_what_is_not_strict_json_of_a_known_format_is_refused(sample: Bundle, text: bytes) -> None:
    (sample.path / "bundle.json").write_bytes(text)
    refused(errors.BundleFormat, sample.path, "bundle.json")


def test_a_key_that_stands_twice_is_refused_and_named(sample: Bundle) -> None:
    file = sample.path / "bundle.json"
    file.write_text(file.read_text().replace('"fold": "0",', '"fold": "0", "fold": "1",', 1))
    refused(errors.BundleFormat, sample.path, "twice", "fold")


@pytest.mark.parametrize("value", ["1", 1.0, True, 0, -1, None, [1]])
def test_the_format_is_a_positive_integer(sample: Bundle, value: Any) -> None:
    refused(errors.BundleFormat, changed(sample, lambda data: data.update(format=value)), "format")


def test_a_newer_format_names_the_version_that_it_needs(sample: Bundle) -> None:
    def newer(data: Any) -> None:
        data.clear()
        data.update(format=FORMAT + 1, provenance={"trtbuild": "3.1.4"}, something={"new": 1})

    refused(errors.BundleFormat, changed(sample, newer), "needs trtbuild >= 3.1.4", "expected", "got")
    write_json(sample.path, {"format": 99, "provenance": {"trtbuild": "1'; rm -rf ~"}})
    assert "rm -rf" not in str(refused(errors.BundleFormat, sample.path, "trtbuild"))


# ---- sizes beyond any real bundle


def test_a_huge_bundle_json_is_not_read(sample: Bundle) -> None:
    with open(sample.path / "bundle.json", "r+b") as file:
        file.truncate(1 << 40)  # sparse
    refused(errors.BundleTooLarge, sample.path, str(16 << 20), str(1 << 40))


@pytest.mark.parametrize(
    "text",
    [b'{"format": 1, "x": ' + b"[" * 100_000, b'{"x":' * 40 + b"1" + b"}" * 40, b"[" + b"0," * 600_000 + b"0]",
     b'{"format": 1, "x": 9223372036854775808}', b'{"format": 1, "x": ' + b"9" * 6000 + b"}"],
)  # fmt: skip
def test_depth_number_of_values_and_integers_are_bounded(sample: Bundle, text: bytes) -> None:
    (sample.path / "bundle.json").write_bytes(text)
    refused(errors.BundleTooLarge, sample.path)


def test_brackets_inside_of_text_do_not_count_as_depth(sample: Bundle) -> None:
    deep = {"a": "[" * 1000, "b": '\\"[[' * 100, "c\\": "{" * 1000, '"': '\\\\"{' * 100}
    assert open_bundle(changed(sample, lambda data: data.update(extensions=deep))).manifest.extensions == deep


def absurd(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (absurd("files", NETWORK, "size", value=1 << 50), f"files['{NETWORK}'].size"),
        (lambda data: data.update(files={f"f{n}": {"size": 0, "sha256": "0" * 64} for n in range(10_001)}), "files"),
        (absurd("stages", 0, "spec", "patch", value=[1 << 30, 4]), "stages[0].spec.patch"),
        (absurd("engines", 0, "profile", "max", value=[10**9, 1, 8, 8]), "engines[0].profile.max"),
    ],
)
def test_declared_sizes_are_bounded(sample: Bundle, change: Callable[[Any], None], key: str) -> None:
    refused(errors.BundleTooLarge, changed(sample, change), f"bundle.json: {key}", "at most")


def test_half_a_million_wrong_values_are_refused_in_bounded_time(sample: Bundle) -> None:
    write_json(sample.path, read_json(sample.path) | {"stages": [{}] * 160_000})
    refused(errors.BundleKey, sample.path, "stages[0]")


# ---- keys


def every_key(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys of the format (not those that name files, labels, packages …)."""
    free = {"names", "device_per_batch", "device", "options", "sources", "versions", "extensions", "calibrations"}
    found = []
    if isinstance(data, dict):
        for key, value in data.items():
            found += [] if path == ("files",) else [(*path, key)]
            found += [] if key in free else every_key(value, (*path, key))
    elif isinstance(data, list):
        for n, value in enumerate(data):
            found += every_key(value, (*path, n))
    return found


KEYS = every_key(json_from_value(CONTENTS))


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def test_every_key_must_be_there(sample: Bundle) -> None:
    good = read_json(sample.path)
    assert len(KEYS) > 100
    for path in KEYS:
        data = copy.deepcopy(good)
        del at(data, path[:-1])[path[-1]]
        write_json(sample.path, data)
        refused(errors.BundleFormat if path == ("format",) else errors.BundleKey, sample.path, str(path[-1]))


def test_an_unknown_key_is_refused_in_every_object_but_extensions(sample: Bundle) -> None:
    good = read_json(sample.path)
    for path in {path[:-1] for path in KEYS}:
        data = copy.deepcopy(good)
        at(data, path)["surprise"] = 1
        write_json(sample.path, data)
        error = refused(errors.BundleKey, sample.path, "surprise")
        assert str(error.where).endswith("surprise")
    write_json(sample.path, good | {"extensions": {"surprise": 1}})
    assert open_bundle(sample.path).manifest.extensions == {"surprise": 1}


def test_a_value_of_another_type_is_refused_at_every_key(sample: Bundle) -> None:
    good = read_json(sample.path)
    for path in KEYS:
        value = at(good, path)
        for wrong in ("text", 7, 1.5, True, [], {}, ["text"], str(value)):
            if type(wrong) is type(value) or path == ("format",) or path[-1] in ("extensions", "spacing"):
                continue
            if isinstance(value, float) and isinstance(wrong, int) and not isinstance(wrong, bool):
                continue
            if value is None and isinstance(wrong, (str, int)):
                continue  # optional: a value of the right type, which other rules may or may not allow
            data = copy.deepcopy(good)
            at(data, path[:-1])[path[-1]] = wrong
            write_json(sample.path, data)
            with pytest.raises(errors.BundleError) as caught:
                open_bundle(sample.path)
            assert isinstance(caught.value, (errors.BundleKey, errors.BundlePath)), (path, wrong)


SPEC_KEY, NET = ("stages", 0, "spec"), ("stages", 0, "networks")


@pytest.mark.parametrize(
    ("keys", "value", "where", "words"),
    [
        (("stages",), [], "stages", "1 or 2"),
        ((*SPEC_KEY, "patch"), [8], "stages[0].spec", "2-D or 3-D"),
        ((*SPEC_KEY, "transpose_forward"), [0, 0, 1], "stages[0].spec", "permutation"),
        ((*SPEC_KEY, "spacing"), [1.0, "1.0"], "stages[0].spec.spacing[1]", "float"),
        ((*SPEC_KEY, "reader"), "PickleIO", "stages[0].spec.reader", "'SimpleITKIO'"),
        ((*SPEC_KEY, "normalization", 0, "kind"), "median", "stages[0].spec.normalization[0].kind", "'rgb_to_01'"),
        ((*SPEC_KEY, "normalization", 0, "masked"), "no?", "stages[0].spec.normalization[0].masked", "boolean"),
        ((*SPEC_KEY, "normalization", 0), {"kind": "ct", "lower": 0.0, "upper": 1.0, "mean": "x", "std": 1.0},
         "stages[0].spec.normalization[0].mean", "number"),
        ((*SPEC_KEY, "step_size"), 0.0, "stages[0].spec.step_size", "at most 1"),
        ((*SPEC_KEY, "sigma_scale"), 0, "stages[0].spec.sigma_scale", "above 0"),
        ((*SPEC_KEY, "labels", "values"), [], "stages[0].spec.labels.values", "at least one"),
        (("stages", 0, "mirror_axes"), [0, 2], "stages[0].mirror_axes", "below 2"),
        (("stages", 0, "mirror_axes"), [-1], "stages[0].mirror_axes", "below 2"),
        (("stages", 0, "mirror_axes"), [0, 0], "stages[0].mirror_axes", "distinct"),
        (("stages", 0, "mirror_axes"), [True], "stages[0].mirror_axes[0]", "bool"),
        (("stages", 0, "networks"), [], "stages[0].networks", "at least one"),
        ((*NET, 1, "id"), "fold_0_fp32", "stages[0].networks[1].id", "twice"),
        ((*NET, 0, "id"), "", "stages[0].networks[0].id", "empty"),
        ((*NET, 0, "opset"), "20", "stages[0].networks[0].opset", "int"),
        ((*NET, 0, "file"), "networks/none.onnx", "stages[0].networks[0].file", "key of files"),
        ((*NET, 0, "file"), "plans.json", "stages[0].networks[0].file", ".onnx"),
        ((*NET, 1, "file"), NETWORK, "stages[0].networks[1].file", "share"),
        ((*NET, 0, "parent"), "fold_0_int8", "stages[0].networks[0].parent", "before it"),
        ((*NET, 1, "fold"), "1", "stages[0].networks[1].parent", "same fold"),
        ((*NET, 0, "precision"), "fp8", "stages[0].networks[0].precision", "'bf16'"),
        ((*NET, 0, "io", 0, "shape"), ["batch", 2, 8, 8], "stages[0].networks[0].io[0].shape", "('batch', 1, 8, 8)"),
        ((*NET, 0, "io", 1, "shape"), ["batch", 3, 8, 8], "stages[0].networks[0].io[1].shape", "('batch', 2, 8, 8)"),
        ((*NET, 0, "io", 0, "shape"), [], "stages[0].networks[0].io[0].shape", "('batch', 1, 8, 8)"),
        ((*NET, 0, "io", 0, "shape", 0), 0, "stages[0].networks[0].io[0].shape", "batch"),
        ((*NET, 0, "io", 0, "shape", 2), "y", "stages[0].networks[0].io[0].shape", "('batch', 1, 8, 8)"),
        ((*NET, 0, "io", 0, "dtype"), "object", "stages[0].networks[0].io[0].dtype", "float32"),
        ((*NET, 0, "io", 0, "name"), "logits", "stages[0].networks[0].io", "different names"),
        ((*NET, 0, "io"), [], "stages[0].networks[0].io", "one input"),
        (("engines", 0, "network"), "fold_7", "engines[0].network", "fold_0_fp32"),
        (("engines", 0, "file"), "engines/none.engine", "engines[0].file", "key of files"),
        (("engines", 0, "profile", "opt"), [4, 1, 8, 9], "engines[0].profile.opt", "('batch', 1, 8, 8)"),
        (("engines", 0, "profile", "opt"), [], "engines[0].profile.opt", "('batch', 1, 8, 8)"),
        (("engines", 0, "profile", "min"), [0, 1, 8, 8], "engines[0].profile.min", "batch"),
        (("engines", 0, "profile", "min"), [9, 1, 8, 8], "engines[0].profile", "min <= opt <= max"),
        (("engines", 0, "memory", "host"), -1, "engines[0].memory", "0 bytes or more"),
        (("engines", 0, "memory", "device_per_batch"), {"1": -1}, "engines[0].memory", "0 bytes or more"),
        (("engines", 0, "memory", "device_per_batch"), {"one": 1}, "engines[0].memory.device_per_batch", "decimal"),
        (("engines", 0, "options"), {"x": None}, "engines[0].options.x", "string"),
        (("goldens", 0, "network"), "fold_7", "goldens[0].network", "fold_0_fp32"),
        (("goldens", 0, "network"), None, "goldens[0].network", "fold_0_fp32"),
        (("goldens", 0, "spacing"), [1.0, 1.0, 1.0], "goldens[0].spacing", "none for a patch"),
        (("goldens", 1, "spacing"), None, "goldens[1].spacing", "three positive"),
        (("goldens", 1, "spacing"), [0.0, 1.0, 1.0], "goldens[1].spacing", "three positive"),
        (("goldens", 1, "network"), "fold_0_fp32", "goldens[1].network", "whole bundle"),
        (("goldens", 1, "kind"), "volume", "goldens[1].kind", "'case'"),
        (("goldens", 0, "input"), "goldens/none.npy", "goldens[0].input", "key of files"),
        (("goldens", 0, "output"), "plans.json", "goldens[0].output", ".npy"),
        (("gates",), [3], "gates[0]", "dictionary"),
        (("provenance", "created"), "yesterday", "provenance.created", "2026-01-31T12:00:00Z"),
        (("provenance", "sources"), {"a": "b"}, "provenance.sources['a']", "64"),
        (("files", NETWORK, "sha256"), "A" * 64, f"files['{NETWORK}'].sha256", "lower-case"),
        (("files", NETWORK, "size"), -1, f"files['{NETWORK}'].size", "0 or more"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other_name_the_key(
    sample: Bundle, keys: tuple[Any, ...], value: Any, where: str, words: str
) -> None:
    error = refused(errors.BundleKey, changed(sample, absurd(*keys, value=value)), words)
    assert error.where == f"{sample.path / 'bundle.json'}: {where}"
    assert error.got is not None
    assert error.what


def test_a_cascade_must_follow_its_first_stage(sample: Bundle) -> None:
    """Second stage: one more input channel per foreground label, previous_stage = the first's configuration."""

    def cascade(previous: Any, first_previous: Any = None, channels: int = 2) -> Callable[[Any], None]:
        def change(data: Any) -> None:
            first, second = data["stages"][0], copy.deepcopy(data["stages"][0])
            first["spec"]["previous_stage"] = first_previous
            second["spec"].update(configuration="second", previous_stage=previous)
            second["networks"] = second["networks"][:1]
            second["networks"][0].update(id="second", file="networks/fold_0_int8.onnx")
            second["networks"][0]["io"][0]["shape"][1] = channels
            first["networks"] = first["networks"][:1]
            data.update(stages=[first, second], engines=[])

        return change

    good = read_json(sample.path)
    opened = open_bundle(changed(sample, cascade("2d")))
    assert [stage.spec.network_channels for stage in opened.manifest.stages] == [1, 2]
    for change, where in (
        (cascade(None), "stages[1]"),
        (cascade("3d_lowres"), "stages[1].spec.previous_stage"),
        (cascade("2d", channels=1), "stages[1].networks[0].io[0].shape"),
        (cascade("2d", first_previous="x"), "stages[0]"),
    ):
        write_json(sample.path, good)
        error = refused(errors.BundleKey, changed(sample, change))
        assert f"bundle.json: {where}" in str(error.where)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("dataset", "Dataset002_Other"),
        ("channels", ["T2"]),
        ("reader", "NibabelIO"),
        ("file_ending", ".nii"),
        ("labels", {"names": {"background": [0], "tumour": [1]}}),
    ],
)
def test_the_stages_of_a_cascade_agree_about_image_and_labels(sample: Bundle, fact: str, value: Any) -> None:
    def change(data: Any) -> None:
        first, second = data["stages"][0], copy.deepcopy(data["stages"][0])
        second["spec"].update(configuration="second", previous_stage="2d")
        first["networks"], second["networks"] = first["networks"][:1], second["networks"][:1]
        second["networks"][0].update(id="second", file="networks/fold_0_int8.onnx")
        second["networks"][0]["io"][0]["shape"][1] = 2
        old = second["spec"][fact]
        second["spec"][fact] = old | value if isinstance(old, dict) else value
        data.update(stages=[first, second], engines=[])

    error = refused(errors.BundleKey, changed(sample, change), f"differ in {fact}")
    assert str(error.where).endswith(f"stages[1].spec.{fact}")


def test_a_single_second_stage_takes_its_first_ones_segmentations_from_files(sample: Bundle) -> None:
    def second_only(data: Any) -> None:
        data["stages"][0]["spec"]["previous_stage"] = "3d_lowres"
        for network in data["stages"][0]["networks"]:
            network["io"][0]["shape"][1] = 2
        data["engines"] = []

    assert open_bundle(changed(sample, second_only)).manifest.stages[0].spec.network_channels == 2


def test_two_engines_of_a_network_for_one_backend_are_refused(sample: Bundle) -> None:
    """Which of them runs would be left to their order."""

    good = read_json(sample.path)
    for engine in good["engines"]:  # one with a file of its own, one that is the network's file
        write_json(sample.path, {**good, "engines": [*good["engines"], {**engine, "version": "another"}]})
        error = refused(errors.BundleKey, sample.path, "two engines")
        assert str(error.where).endswith("engines[2].backend")


def test_hostile_text_reaches_the_terminal_escaped_and_cut(sample: Bundle) -> None:
    error = refused(errors.BundleKey, changed(sample, lambda data: data.update({"\x1b[2J" + "x" * 5000: 1})))
    assert "\x1b" not in str(error)
    assert len(str(error)) < 1500


# ---- paths

BAD_NAMES = ["/etc/passwd", "../escape.onnx", "networks/../../escape.onnx", "./a", "a//b", "a/", "", ".", "..", "a/./b",
             "networks\\a.onnx", "C:a.onnx", "C:/a.onnx", "~/a", "a\0b", "a\nb", "a b", ".hidden", "a/.hidden", "a.",
             "a./b", "-rf", "naïve.onnx", "x" * 201, "bundle.json", "BUNDLE.JSON"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_listed_name_that_could_leave_the_bundle_is_refused(sample: Bundle, name: str) -> None:
    def listed(data: Any) -> None:
        data["files"][name] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}

    error = refused(errors.BundlePath, changed(sample, listed), "bundle.json: files[")
    assert "\0" not in str(error)


@pytest.mark.parametrize("keys", [(*NET, 0, "file"), ("engines", 0, "file"), ("goldens", 0, "input")])
def test_a_reference_that_could_leave_the_bundle_is_refused(sample: Bundle, keys: tuple[Any, ...]) -> None:
    refused(errors.BundlePath, changed(sample, absurd(*keys, value="../../escape.onnx")), str(keys[-1]))


def test_names_that_differ_in_case_alone_are_refused(sample: Bundle) -> None:
    empty = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    good = read_json(sample.path)
    for name in ("PLANS.json", "Networks/other.onnx"):
        write_json(sample.path, good | {"files": good["files"] | {name: empty}})
        refused(errors.BundlePath, sample.path, "case")


def test_a_link_is_refused_even_if_it_points_to_the_right_bytes(sample: Bundle, tmp_path: Path) -> None:
    file = sample.path / NETWORK
    file.rename(tmp_path / "same")
    file.symlink_to(tmp_path / "same")
    refused(errors.BundlePath, sample.path, NETWORK)
    with pytest.raises(errors.BundlePath):
        sample.file(NETWORK)


def test_a_linked_folder_inside_is_refused(sample: Bundle, tmp_path: Path) -> None:
    (sample.path / "networks").rename(tmp_path / "networks")
    (sample.path / "networks").symlink_to(tmp_path / "networks")
    refused(errors.BundlePath, sample.path, "networks")
    with pytest.raises(errors.BundlePath):
        sample.file(NETWORK)


def test_a_dangling_link_that_is_not_listed_is_refused(sample: Bundle) -> None:
    (sample.path / "more").symlink_to("nowhere")
    refused(errors.BundlePath, sample.path, "more")


def test_pipes_and_sockets_are_refused_without_being_opened(sample: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sample.path / NETWORK
    file.unlink()
    os.mkfifo(file)
    refused(errors.BundlePath, sample.path, NETWORK)
    with pytest.raises(errors.BundlePath):
        sample.file(NETWORK)
    file.unlink()
    file.write_bytes(FILES[NETWORK])  # type: ignore[arg-type]
    monkeypatch.chdir(sample.path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("door")
        refused(errors.BundlePath, sample.path, "door")


# ---- files


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(sample: Bundle, name: str) -> None:
    (sample.path / name).unlink()
    refused(errors.BundleFileMissing, sample.path, name)
    with pytest.raises(errors.BundleFileMissing):
        sample.file(name)


def test_a_missing_folder_is_a_missing_file(sample: Bundle) -> None:
    for file in (sample.path / "engines").iterdir():
        file.unlink()
    (sample.path / "engines").rmdir()
    refused(errors.BundleFileMissing, sample.path, "engines/fold_0_int8.engine")


@pytest.mark.parametrize("name", ["more.bin", ".DS_Store", "networks/more.onnx", "networks/bundle.json", "bundle.JSON"])
def test_an_extra_file_is_named(sample: Bundle, name: str) -> None:
    (sample.path / name).write_bytes(b"")
    refused(errors.BundleFileExtra, sample.path, name)


def test_extra_folders_are_refused_even_if_empty(sample: Bundle) -> None:
    (sample.path / "networks" / "old").mkdir()
    refused(errors.BundleFileExtra, sample.path, "networks/old")


def test_a_folder_in_the_place_of_a_file_is_refused(sample: Bundle) -> None:
    (sample.path / "plans.json").unlink()
    (sample.path / "plans.json").mkdir()
    refused(errors.BundleFileExtra, sample.path, "plans.json")


@pytest.mark.parametrize("size", [0, 1, 1199, 1201])
def test_a_truncated_or_grown_onnx_has_the_wrong_size(sample: Bundle, size: int) -> None:
    with open(sample.path / NETWORK, "r+b") as file:
        file.truncate(size)
    refused(errors.BundleSize, sample.path, NETWORK, "1200 bytes", f"{size} bytes")
    with pytest.raises(errors.BundleSize):
        sample.file(NETWORK)


def test_changed_bytes_are_found_when_the_file_is_asked_for(sample: Bundle) -> None:
    (sample.path / NETWORK).write_bytes(b"onnx" * 300)
    opened = open_bundle(sample.path)
    with pytest.raises(errors.BundleHash) as caught:
        opened.network_file("fold_0_fp32")
    right, wrong = hashlib.sha256(b"ONNX" * 300).hexdigest(), hashlib.sha256(b"onnx" * 300).hexdigest()
    assert right in str(caught.value.expected)
    assert wrong in str(caught.value.got)
    assert NETWORK in str(caught.value.where)
    assert caught.value.hint
    assert opened.file("plans.json").read_bytes() == b"{}"  # the other files are as good as before
    with pytest.raises(errors.BundleHash):
        verify_bundle(opened)


def test_a_wrong_hash_in_bundle_json_is_found_too(sample: Bundle) -> None:
    opened = open_bundle(changed(sample, absurd("files", NETWORK, "sha256", value="0" * 64)))
    with pytest.raises(errors.BundleHash):
        opened.file(NETWORK)


def test_a_hash_is_computed_once_by_file_and_always_by_verify(sample: Bundle) -> None:
    opened = open_bundle(sample.path)
    opened.file("plans.json")
    (sample.path / "plans.json").write_bytes(b"[]")
    opened.file("plans.json")  # remembered: files of a bundle do not change
    with pytest.raises(errors.BundleHash):
        verify_bundle(opened)


def test_every_flipped_byte_is_found_by_verify(sample: Bundle) -> None:
    for name in [*FILES, "bundle.json"]:
        file = sample.path / name
        good = file.read_bytes()
        for n in range(0, len(good), max(1, len(good) // 40)):
            file.write_bytes(good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1 :])
            with pytest.raises(errors.BundleError):
                verify_bundle(sample)
        file.write_bytes(good)
    assert verify_bundle(sample)


def test_bundle_json_changed_after_opening_is_found_by_verify(sample: Bundle) -> None:
    changed(sample, lambda data: data["provenance"].update(model="another"))
    assert open_bundle(sample.path)  # right in itself: only the identity tells
    with pytest.raises(errors.BundleHash, match=r"bundle\.json"):
        verify_bundle(sample)


def test_asking_for_what_is_not_there_is_an_error_that_lists_what_is(sample: Bundle) -> None:
    with pytest.raises(errors.BundleFileMissing, match="trtbuild inspect"):
        sample.file("../../etc/passwd")
    with pytest.raises(errors.BundleKey, match="fold_0_int8"):
        sample.network_file("fold_9")


def test_a_bundle_that_is_exchanged_while_it_is_opened_is_read_again(
    sample: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtbuild.bundle import reader

    check, calls = reader.check_listing, []

    def exchanged(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            monkeypatch.undo()
            write_sample(tmp_path, overwrite=True, gates=({"new": True},), engines=())
            (sample.path / "plans.json").write_bytes(b"{}")
            monkeypatch.setattr(reader, "check_listing", exchanged)
            raise errors.BundleSize("as it would be if the folder changed in between")
        check(*args)

    monkeypatch.setattr(reader, "check_listing", exchanged)
    assert open_bundle(sample.path).manifest.gates == ({"new": True},)
    assert len(calls) == 2


def test_the_sample_has_what_the_tests_rely_on() -> None:
    assert SPEC.patch == (8, 8)
    assert len(FILES[NETWORK]) == 1200  # type: ignore[arg-type]
