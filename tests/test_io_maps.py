"""Maps of 0 to 1 (disagreement) through every writer: one scale whatever the values are, and the place of the image."""

from __future__ import annotations

from pathlib import Path

import imageio.v3
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from test_io_labels import saved

from trtbuild.spec import Reader
from trtbuild.volume.image import PixelGeometry
from trtbuild.volume.io import reader_named

VOLUMES: list[Reader] = ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"]


def a_map(top: float, shape: tuple[int, int, int] = (5, 6, 7)) -> np.ndarray:
    values = np.random.default_rng(0).uniform(0, top, shape).astype(np.float32)
    values[0, 0, 0] = top
    return values


@pytest.mark.parametrize("name", VOLUMES)
@pytest.mark.parametrize("top", [0.0, 0.003, 1.0])
def test_a_volume_keeps_its_floats_and_its_place(tmp_path: Path, name: Reader, top: float) -> None:
    source = saved(name, tmp_path, a_map(1.0), "oblique and negative")
    image = reader_named(name).read_image([source], ("c",))
    values = a_map(top, image.data.shape[1:])
    reader_named(name).write_segmentation(values, image.geometry, tmp_path / "map.nii.gz")
    again = reader_named(name).read_image([tmp_path / "map.nii.gz"], ("c",))
    np.testing.assert_array_equal(again.data[0], values)
    one, other = sitk.ReadImage(str(source)), sitk.ReadImage(str(tmp_path / "map.nii.gz"))
    assert other.GetPixelID() == sitk.sitkFloat32
    assert nibabel.load(tmp_path / "map.nii.gz").get_data_dtype() == np.float32
    assert one.GetSize() == other.GetSize()
    np.testing.assert_allclose(other.GetSpacing(), one.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(other.GetOrigin(), one.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(other.GetDirection(), one.GetDirection(), atol=1e-6)


@pytest.mark.parametrize("top", [0.0, 0.003, 1.0])
def test_a_stack_keeps_its_floats_and_its_spacing(tmp_path: Path, top: float) -> None:
    image = reader_named("Tiff3DIO").read_image([saved("Tiff3DIO", tmp_path, a_map(1.0))], ("c",))
    values = a_map(top)
    reader_named("Tiff3DIO").write_segmentation(values, image.geometry, tmp_path / "map.tif")
    written = tifffile.imread(tmp_path / "map.tif")
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, values)
    assert reader_named("Tiff3DIO").read_image([tmp_path / "map.tif"], ("c",)).spacing == image.spacing


@pytest.mark.parametrize("top", [0.0, 0.0001, 0.003, 0.5, 1.0])
@pytest.mark.parametrize(("ending", "scale", "dtype"), [(".png", 65535, np.uint16), (".bmp", 254, np.uint8),
                                                        (".tif", 1, np.float32)])  # fmt: skip
def test_a_picture_has_one_scale_whatever_its_values_are(
    tmp_path: Path, ending: str, scale: int, dtype: type, top: float
) -> None:
    values = a_map(top, (1, 6, 7))
    path = tmp_path / f"map{ending}"
    reader_named("NaturalImage2DIO").write_segmentation(values, PixelGeometry(), path)
    written = tifffile.imread(path) if ending == ".tif" else imageio.v3.imread(path, plugin="pillow")
    assert written.dtype == dtype
    assert written.shape == (6, 7)
    np.testing.assert_allclose(written, values[0] * scale, rtol=1e-7, atol=0 if scale == 1 else 0.5 + 1e-3)
