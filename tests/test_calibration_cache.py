"""TensorRT's calibration cache: byte for byte there and back, and every way in which a file can be wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild_calibration import (
    CacheError,
    CalibrationError,
    cache_from_bytes,
    cache_from_scales,
    check_cache,
    read_cache,
    write_cache,
)

# as TensorRT writes them: no leading zeros, names with ": " and blanks, a zero
TENSORRT = (
    b"TRT-101401-EntropyCalibration2\n"
    b"data_0: 4000889d\n"
    b"(Unnamed Layer* 64) [Shuffle]_output: 3c010a14\n"
    b"onnx::Conv_1: x: 1000000\n"
    b"dead: 0\n"
)
SCALES = st.floats(float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max), width=32)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1, max_size=20)


def independent_parser(raw: bytes) -> dict[str, float]:
    """ONNX Runtime's documented rule: skip the header; name, colon, hex digits of the float32, big-endian."""
    found = {}
    for line in raw.decode().split("\n")[1:-1]:
        place = line.rindex(": ")
        word = int(line[place + 2 :], 16)
        found[line[:place]] = float(np.array([word], ">u4").view(">f4")[0])
    return found


def test_a_file_of_tensorrts_comes_out_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    path.write_bytes(TENSORRT)
    cache = read_cache(path)
    assert (cache.version, cache.kind) == (101401, "EntropyCalibration2")
    assert list(cache.digits) == ["data_0", "(Unnamed Layer* 64) [Shuffle]_output", "onnx::Conv_1: x", "dead"]
    assert cache.scales["data_0"] == struct.unpack("!f", bytes.fromhex("4000889d"))[0]
    assert cache.scales["onnx::Conv_1: x"] == struct.unpack("!f", bytes.fromhex("01000000"))[0]
    assert cache.amax["dead"] == 0.0
    assert cache.scales == independent_parser(TENSORRT)
    write_cache(path, cache)
    assert path.read_bytes() == TENSORRT


@given(scales=st.dictionaries(NAMES, SCALES, min_size=1), version=st.integers(1000, 9999999))
@settings(max_examples=200, deadline=None)
def test_our_files_come_back_byte_for_byte(scales: dict[str, float], version: int) -> None:
    raw = cache_from_scales(scales, version=version, kind="MinMaxCalibration").to_bytes()
    back = cache_from_bytes(raw)
    assert back.to_bytes() == raw
    assert back.scales == scales == independent_parser(raw)
    assert list(back.scales) == list(scales)
    assert back.version == version
    assert {len(digits) for digits in back.digits.values()} == {8}


def test_modelopts_rule_reads_ours() -> None:
    """`import_scales_from_calib_cache`: two parts at ": ", and `bytes.fromhex` without filling up zeros."""
    scales = {"image": 0.03125, "/encoder/conv_1/Conv_output_0": float(np.finfo(np.float32).tiny)}
    lines = cache_from_scales(scales, version=101601, kind="EntropyCalibration2").to_bytes().decode().splitlines()
    found = {}
    for line in lines[1:]:
        name, digits = line.split(": ")
        found[name] = struct.unpack("!f", bytes.fromhex(digits))[0]
    assert found == scales
    assert lines[0] == "TRT-101601-EntropyCalibration2"


def test_scales_are_rounded_to_float32() -> None:
    cache = cache_from_scales({"a": 0.1}, version=8400, kind="EntropyCalibration2")
    assert cache.to_bytes() == b"TRT-8400-EntropyCalibration2\na: 3dcccccd\n"


ENDS = [place + 1 for place, byte in enumerate(TENSORRT) if byte == ord("\n")]


@pytest.mark.parametrize("length", [n for n in range(1, len(TENSORRT)) if n not in ENDS])
def test_a_cache_that_is_cut_in_a_line_names_the_line(length: int) -> None:
    part = TENSORRT[:length]
    line = part.count(b"\n") + 1
    with pytest.raises(CacheError, match=rf"(is cut|no calibration cache)[^$]*x\.cache, line {line}\n") as caught:
        cache_from_bytes(part, "x.cache")
    assert line == 1 or caught.value.what == "The calibration cache is cut."


@pytest.mark.parametrize("length", ENDS[1:-1])
def test_a_cache_that_is_cut_between_lines_lacks_tensors(length: int) -> None:
    """The file is whole by itself; only beside the network it shows."""
    cache = cache_from_bytes(TENSORRT[:length])
    with pytest.raises(CacheError, match=r"not of this network[^$]*dead"):
        check_cache(cache, cache_from_bytes(TENSORRT).digits)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"\n", "no calibration cache[^$]*line 1"),
        (b"TRT-8400-EntropyCalibration2", "is cut[^$]*line 1"),
        (b"TRT-8400-EntropyCalibration2\n", "holds no scales"),
        (b"TRT-8400-LegacyCalibration\na: 3f800000\n", "no calibration cache[^$]*LegacyCalibration"),
        (b"TRT-8400-EntropyCalibration2\r\na: 3f800000\r\n", "no calibration cache"),
        (b"TRT-x-EntropyCalibration2\na: 3f800000\n", "no calibration cache"),
        (b"PK\x03\x04 an archive", "no calibration cache"),
        (b"TRT-8400-EntropyCalibration2\na: \xff\xfe\n", "no text[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\na: 3f800000\n\nb: 3f800000\n", "damaged[^$]*line 3"),
        (b"TRT-8400-EntropyCalibration2\na 3f800000\n", "damaged[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\na: 3f8000\n", "scale[^$]*damaged[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\na: 3f80000g\n", "damaged[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\na: 3f8000000\n", "damaged[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\n: 3f800000\n", "damaged[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\na: 7f800000\n", "scale[^$]*damaged[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\na: 7fc00000\n", "scale[^$]*damaged[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\na: bf800000\n", "scale[^$]*damaged[^$]*line 2"),
        (b"TRT-8400-EntropyCalibration2\na: 3f800000\na: 3f800000\n", "twice[^$]*line 3"),
    ],
)
def test_each_way_to_be_wrong_has_its_message(raw: bytes, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        cache_from_bytes(raw)


def test_a_cache_of_another_network_names_what_is_missing(tmp_path: Path) -> None:
    cache = cache_from_bytes(TENSORRT)
    assert list(check_cache(cache, ["dead", "data_0"]).items()) == [("dead", 0.0), ("data_0", cache.amax["data_0"])]
    with pytest.raises(CacheError, match=r"not of this network[^$]*5 are missing: t0, t1, t2 and 2 more"):
        check_cache(cache, ["data_0", *(f"t{i}" for i in range(5))])
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_cache(tmp_path / "none.cache")


@pytest.mark.parametrize(
    ("scales", "options"),
    [
        ({}, {}),
        ({"a": 0.0}, {}),
        ({"a": -1.0}, {}),
        ({"a": float("nan")}, {}),
        ({"a": float("inf")}, {}),
        ({"a": 1e300}, {}),
        ({"a": 1e-44}, {}),
        ({"": 1.0}, {}),
        ({"a\nb": 1.0}, {}),
        ({"a": 1.0}, {"version": 10}),
        ({"a": 1.0}, {"kind": "EntropyCalibration"}),
    ],
)
def test_what_the_format_cannot_hold_is_refused(scales: dict, options: dict) -> None:
    with pytest.raises(CacheError):
        cache_from_scales(scales, **{"version": 8400, "kind": "EntropyCalibration2", **options})
