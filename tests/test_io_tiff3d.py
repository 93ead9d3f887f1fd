"""Tiff3DIO against nnU-Net's own class: arrays, spacing, the bytes of both files; damage that tifffile only logs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from trtbuild.errors import InputError
from trtbuild.volume.image import PixelGeometry, TiffGeometry
from trtbuild.volume.io import files_beside, reader_named

ours = reader_named("Tiff3DIO")
pytestmark = pytest.mark.parity
SHAPE = (9, 10, 11)


def stack(dtype: str = "uint16", shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) * 200).astype(dtype)


def saved(file: Path, values: np.ndarray | None = None, spacing: Any = None, **options: Any) -> Path:
    """A stack, and its spacing in the file where nnU-Net looks for it."""
    tifffile.imwrite(file, stack() if values is None else values, **{"photometric": "minisblack", **options})
    if spacing is not None:
        file.with_name(file.name.split("_0")[0] + ".json").write_text(json.dumps({"spacing": spacing}))
    return file


def assert_reads_the_same(files: list[Path]) -> tuple[Any, dict[str, Any]]:
    data, properties = Tiff3DIO().read_images([str(file) for file in files])
    names = tuple(f"c{i}" for i in range(len(data)))
    image = ours.read_image(files, names)
    assert image.data.dtype == np.float32
    np.testing.assert_array_equal(image.data, data)
    assert image.spacing == tuple(properties["spacing"])
    assert ours.nnunet_properties(image) == {"spacing": list(properties["spacing"])}
    header = ours.image_header(files, names)
    assert header is not None
    assert (header.channels, *header.shape) == data.shape
    assert header.spacing == image.spacing
    return image, properties


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zlib": {"compression": "zlib"},
    "zlib with predictor": {"compression": "zlib", "predictor": True},
    "pages of another program": {"metadata": None},
    "zlib pages": {"metadata": None, "compression": "zlib"},
    "tiles": {"tile": (16, 16), "compression": "zlib"},
    "strips": {"rowsperstrip": 3},
    "big tiff": {"bigtiff": True, "metadata": None},
    "big endian": {"byteorder": ">"},
    "ImageJ": {"imagej": True},
    "OME": {"ome": True},
    "lzw": {"compression": "lzw"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_kind_of_stack_is_read_as_by_nnunet(tmp_path: Path, way: str, dtype: str) -> None:
    file = saved(tmp_path / "a_0000.tif", stack(dtype), [3.5, 0.5, 1], **WAYS[way])
    image, _ = assert_reads_the_same([file])
    np.testing.assert_array_equal(image.data[0], stack(dtype))
    assert image.warnings == ()


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32", "float64", "int8"])
def test_every_type_is_read_as_by_nnunet(tmp_path: Path, dtype: str) -> None:
    assert_reads_the_same([saved(tmp_path / "a_0000.tiff", stack(dtype), [1, 2, 3])])


def test_channels_share_the_spacing_that_stands_beside_them(tmp_path: Path) -> None:
    files = [saved(tmp_path / f"a.b_000{i}.tif", stack(seed=i), [2.5, 0.5, 0.7]) for i in range(3)]
    image, _ = assert_reads_the_same(files)
    assert image.spacing == (2.5, 0.5, 0.7)


def test_without_a_spacing_it_is_one_and_the_user_is_told(tmp_path: Path) -> None:
    image, _ = assert_reads_the_same([saved(tmp_path / "a_0000.tif")])
    assert image.spacing == (1, 1, 1)
    assert image.warnings == ("There is no a.json, so the spacing is taken to be 1 x 1 x 1 mm, as nnU-Net does.",)
    assert ours.read_segmentation(saved(tmp_path / "b.tif")).warnings[0].startswith("There is no b.json")


def test_an_image_without_channel_number_has_its_spacing_under_its_own_name(tmp_path: Path) -> None:
    file = saved(tmp_path / "scan_1234x.tif")
    (tmp_path / "scan_1234x.json").write_text('{"spacing": [2, 3, 4]}')
    assert Tiff3DIO().read_images([str(file)])[1]["spacing"] == (1, 1, 1)  # nnU-Net looks for scan_.json
    assert ours.read_image([file], ("c",)).spacing == (2, 3, 4)


@pytest.mark.parametrize("content", [
    "", "{", "[1, 2, 3]", "{}", '{"spacing": 1}', '{"spacing": "111"}', '{"spacing": [1, 1]}',
    '{"spacing": [1, 1, 1, 1]}', '{"spacing": [0, 1, 1]}', '{"spacing": [-1, 1, 1]}', '{"spacing": [NaN, 1, 1]}',
    '{"spacing": [Infinity, 1, 1]}', '{"spacing": [true, 1, 1]}', '{"spacing": ["1", 1, 1]}', '{"spacing": null}',
    '{"spacing": [1' + "0" * 400 + ", 1, 1]}", "[" * 100_000, "null", '{"spacing": [[1], 1, 1]}',
])  # fmt: skip
def test_a_spacing_that_is_none_is_refused_by_the_file_that_says_it(tmp_path: Path, content: str) -> None:
    file = saved(tmp_path / "a_0000.tif")
    (tmp_path / "a.json").write_text(content)
    for read in (lambda: ours.read_image([file], ("c",)), lambda: ours.image_header([file], ("c",))):
        with pytest.raises(InputError, match="does not say its spacing") as error:
            read()
        assert error.value.where == tmp_path / "a.json"


def test_a_spacing_that_cannot_be_read_is_no_missing_one(tmp_path: Path) -> None:
    file = saved(tmp_path / "a_0000.tif")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        ours.read_image([file], ("c",))


@pytest.mark.parametrize("shape", [(10, 11), (2, 3, 10, 11)])
def test_only_three_dimensions_are_taken(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = saved(tmp_path / "a_0000.tif", stack(shape=shape))
    with pytest.raises(RuntimeError):
        Tiff3DIO().read_images([str(file)])
    with pytest.raises(InputError, match="no stack of slices"):
        ours.read_image([file], ("c",))
    with pytest.raises(InputError, match="no stack of slices"):
        ours.image_header([file], ("c",))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "lzw"])
def test_a_truncated_stack_never_comes_as_its_first_slices(tmp_path: Path, way: str) -> None:
    file = saved(tmp_path / "a_0000.tif", stack(shape=(9, 50, 60)), [1, 1, 1], **WAYS[way])
    content, refused = file.read_bytes(), 0
    for share in np.linspace(0, 0.999, 40):
        file.write_bytes(content[: int(len(content) * share)])
        try:
            image = ours.read_image([file], ("c",))
        except InputError:
            refused += 1
        else:  # what is cut off is the list of pages, which the shape in the first one replaces
            np.testing.assert_array_equal(image.data[0], stack(shape=(9, 50, 60)))
    assert refused >= 39


def interleaved(values: np.ndarray) -> tuple[bytes, list[int]]:
    """A TIFF whose pages are directory, slice, directory, slice …; and where each slice ends."""
    depth, height, width = values.shape
    content, ends = struct.pack("<2sHI", b"II", 42, 8), []
    for z in range(depth):
        tags = [
            (256, width),
            (257, height),
            (258, 8),
            (259, 1),
            (262, 1),
            (273, 0),
            (278, height),
            (279, height * width),
        ]
        start = len(content) + 2 + 12 * len(tags) + 4
        end = start + height * width
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
        content += struct.pack("<H", len(tags)) + entries + struct.pack("<I", end if z < depth - 1 else 0)
        content += values[z].tobytes()
        ends.append(len(content))
    return content, ends


def test_a_stack_cut_between_two_slices_is_refused_where_tifffile_returns_the_first(tmp_path: Path) -> None:
    content, ends = interleaved(stack("uint8"))
    file = tmp_path / "a_0000.tif"
    file.write_bytes(content)
    np.testing.assert_array_equal(ours.read_image([file], ("c",)).data[0], stack("uint8"))
    for cut in (ends[3], ends[4], ends[7]):
        file.write_bytes(content[:cut])
        assert tifffile.imread(file).ndim == 3  # and shorter
        with pytest.raises(InputError, match="damaged"):
            ours.read_image([file], ("c",))


@pytest.mark.parametrize("top", [1, 254, 255, 256, 65535])
@pytest.mark.parametrize("spacing", [[1, 1, 1], [3.5, 0.25, 1e-3], None])
@pytest.mark.parametrize("ending", [".tif", ".tiff", ".TIF"])
def test_both_written_files_have_the_bytes_of_nnunets(tmp_path: Path, top: int, spacing: Any, ending: str) -> None:
    image, properties = assert_reads_the_same([saved(tmp_path / f"a_0000{ending}", None, spacing)])
    labels = np.random.default_rng(0).integers(0, top + 1, SHAPE)
    labels[0, 0, 0] = top
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    path = tmp_path / "ours" / f"case.1{ending}"
    Tiff3DIO().write_seg(labels, str(tmp_path / "theirs" / path.name), properties)
    ours.write_segmentation(labels, image.geometry, path)
    written = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert written == {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    assert set(written) == {path.name, "case.1.json"} == {path.name, *(f.name for f in files_beside("Tiff3DIO", path))}
    back = ours.read_segmentation(path)
    np.testing.assert_array_equal(back.labels, labels)
    assert back.geometry == image.geometry
    theirs, seg_properties = Tiff3DIO().read_seg(str(path))
    np.testing.assert_array_equal(back.labels, theirs[0])
    assert list(back.spacing) == list(seg_properties["spacing"])


@pytest.mark.parametrize(
    "shape", [(3, 10, 11), (4, 10, 11), (9, 10, 3), (9, 10, 4), (9, 3, 11), (1, 10, 11), (2, 1, 1)]
)
def test_three_or_four_slices_or_columns_are_no_colours(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    labels = np.random.default_rng(0).integers(0, 3, shape)
    ours.write_segmentation(labels, TiffGeometry(spacing=(1, 1, 1)), tmp_path / "a.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), labels)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.MINISBLACK


def test_a_picture_has_no_spacing_to_write(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        ours.write_segmentation(np.zeros((1, 2, 3), int), PixelGeometry(), tmp_path / "a.tif")
