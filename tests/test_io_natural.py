"""NaturalImage2DIO against skimage.io and nnU-Net's own class, for every kind of png, bmp and tif."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.io
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from PIL import Image as Pillow

from trtbuild.errors import InputError, OutputError
from trtbuild.volume.image import PixelGeometry
from trtbuild.volume.io import reader_named
from trtbuild.volume.io.natural_io import pixels_from_file

ours = reader_named("NaturalImage2DIO")
pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)


def noise(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return RNG.standard_normal(shape).astype(dtype)
    return RNG.integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def pillow(mode: str, values: np.ndarray | None = None) -> Callable[[Path], None]:
    """Saves an image of a Pillow mode."""
    rgb = Pillow.fromarray(noise((11, 13, 3)))
    image = Pillow.fromarray(values) if values is not None else rgb.convert(mode)
    return lambda path: image.save(path)


def palette_with_alpha(path: Path) -> None:
    Pillow.fromarray(noise((11, 13, 3))).quantize(16).save(path, transparency=bytes(range(0, 160, 10)))


def grey_palette(path: Path) -> None:
    image = Pillow.fromarray(noise((11, 13)) // 2).convert("P")
    image.putpalette([i for i in range(256) for _ in range(3)])
    image.save(path)


def tif(values: np.ndarray, **options: object) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, values, **options)


PICTURES: dict[str, Callable[[Path], None]] = {
    "8-bit grey.png": pillow("L"),
    "16-bit grey.png": pillow("I;16", noise((11, 13), np.uint16)),
    "rgb.png": pillow("RGB"),
    "rgba.png": pillow("RGBA", noise((11, 13, 4))),
    "1-bit.png": pillow("1"),
    "palette.png": pillow("P"),
    "grey palette.png": grey_palette,
    "palette with alpha.png": palette_with_alpha,
    "grey.bmp": pillow("L"),
    "grey palette.bmp": grey_palette,
    "1-bit.bmp": pillow("1"),
    "rgb.bmp": pillow("RGB"),
    "rgba.bmp": pillow("RGBA", noise((11, 13, 4))),
    "UPPER.PNG": pillow("RGB"),
    "8-bit grey.tif": tif(noise((11, 13))),
    "16-bit grey.tif": tif(noise((11, 13), np.uint16)),
    "float.tif": tif(noise((11, 13), np.float32)),
    "float64.tiff": tif(noise((11, 13), np.float64)),
    "rgb.tif": tif(noise((11, 13, 3)), photometric="rgb"),
    "rgba.tif": tif(noise((11, 13, 4)), photometric="rgb", extrasamples=["unassalpha"]),
    "planar rgb.tif": tif(noise((3, 11, 13)), photometric="rgb", planarconfig="separate"),
    "planar rgba.tif": tif(noise((4, 11, 13)), photometric="rgb", planarconfig="separate", extrasamples=[2]),
    "three pages.tif": tif(noise((3, 11, 13)), photometric="minisblack"),
    "zipped.tif": tif(noise((11, 13), np.uint16), compression="zlib", predictor=True),
    "UPPER.TIF": tif(noise((3, 11, 13)), photometric="rgb", planarconfig="separate"),
}
UNREADABLE: dict[str, Callable[[Path], None]] = {  # skimage reads them, nnU-Net does not take them
    "grey with alpha.png": pillow("LA", noise((11, 13, 2))),
    "five pages.tif": tif(noise((5, 11, 13)), photometric="minisblack"),
    "complex.tif": tif(noise((11, 13), np.float32).astype(np.complex64)),
}


@pytest.mark.parametrize("name", [*PICTURES, *UNREADABLE])
def test_pixels_are_those_of_skimage(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    (PICTURES | UNREADABLE)[name](file)
    expected, got = skimage.io.imread(str(file)), pixels_from_file(file)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", PICTURES)
def test_the_image_is_that_of_nnunet(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    PICTURES[name](file)
    data, properties = NaturalImage2DIO().read_images([str(file)])
    image = ours.read_image([file], tuple("abcd"[: len(data)]))
    assert image.data.dtype == np.float32
    np.testing.assert_array_equal(image.data, data)
    assert image.spacing == properties["spacing"]
    assert ours.nnunet_properties(image) == properties


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_grey_or_colour_picture_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    UNREADABLE[name](file)
    with pytest.raises(InputError, match=r"no picture of the kind|no plain intensities"):
        ours.read_image([file], ("a",))


def test_a_picture_of_three_rows_is_turned_as_skimage_turns_it(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.png"
    Pillow.fromarray(noise((3, 13, 2))).save(file)
    np.testing.assert_array_equal(pixels_from_file(file), skimage.io.imread(str(file)))


def test_colour_and_grey_files_are_not_mixed_and_several_grey_files_are_stacked(tmp_path: Path) -> None:
    grey, colour = tmp_path / "a_0000.png", tmp_path / "a_0001.png"
    pillow("L")(grey)
    pillow("RGB")(colour)
    image = ours.read_image([grey, grey], ("a", "b"))
    np.testing.assert_array_equal(image.data, NaturalImage2DIO().read_images([str(grey)] * 2)[0])
    with pytest.raises(InputError, match="wrong number of channels") as error:
        ours.read_image([grey], ("red", "green", "blue"))
    assert "a_0000.png (red), a_0001.png (green), a_0002.png (blue)" in str(error.value)
    with pytest.raises(InputError, match="differ in shape"):
        ours.read_image([grey, colour], ("a", "b"))


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".tiff", ".TIF", ".PNG"])
@pytest.mark.parametrize("top", [1, 254, 255, 1000])
@pytest.mark.parametrize("shape", [(1, 11, 13), (1, 1, 1), (1, 11, 5)])
def test_written_files_are_those_of_nnunet(tmp_path: Path, ending: str, top: int, shape: tuple[int, ...]) -> None:
    labels = RNG.integers(0, top, shape)
    labels.flat[0] = top
    path, reference = tmp_path / f"ours{ending}", tmp_path / f"theirs{ending}"
    if ending == ".bmp" and top >= 255:  # 16-bit BMP does not exist; nnU-Net fails here too
        with pytest.raises(OSError, match="cannot write mode"):
            NaturalImage2DIO().write_seg(labels, str(reference), {})
        with pytest.raises(OutputError, match="BMP has 8 bits"):
            ours.write_segmentation(labels, PixelGeometry(), path)
        assert not path.exists()
        return
    NaturalImage2DIO().write_seg(labels, str(reference), {})
    ours.write_segmentation(labels, PixelGeometry(), path)
    assert path.read_bytes() == reference.read_bytes()
    np.testing.assert_array_equal(pixels_from_file(path), labels[0])


@pytest.mark.parametrize("shape", [(1, 3, 13), (1, 4, 9), (1, 11, 3), (1, 11, 4)])
def test_a_tif_of_three_or_four_rows_or_columns_is_grey_where_skimage_means_colour(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    labels, path = RNG.integers(0, 3, shape), tmp_path / "a.tif"
    ours.write_segmentation(labels, PixelGeometry(), path)
    np.testing.assert_array_equal(tifffile.imread(path), labels[0])
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.MINISBLACK
    if shape[1] in (3, 4):
        with pytest.raises(ValueError, match="not enough samples"):
            NaturalImage2DIO().write_seg(labels, str(tmp_path / "theirs.tif"), {})


def test_labels_are_not_written_with_loss(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="would not survive"):
        ours.write_segmentation(np.zeros((1, 5, 5), int), PixelGeometry(), tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_compression_without_its_codec_names_the_package(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.tif"
    tifffile.imwrite(file, noise((11, 13)), compression="lzw")
    code = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from pathlib import Path; from trtbuild.volume.io import reader_named\n"
        "try: reader_named('NaturalImage2DIO').read_image([Path(sys.argv[1])], ('a',))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("InputError")
    assert "imagecodecs" in done.stdout


def test_skimage_is_not_imported(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.tif"
    tifffile.imwrite(file, noise((11, 13)))
    code = (
        "import sys; from pathlib import Path; from trtbuild.volume.io import reader_named\n"
        "reader_named('NaturalImage2DIO').read_image([Path(sys.argv[1])], ('a',))\n"
        "print(sorted({'skimage', 'torch', 'SimpleITK', 'nibabel', 'nnunetv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
