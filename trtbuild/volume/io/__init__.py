"""Image files <-> arrays, with the semantics of nnU-Net's own readers and writers.

Does: reads the files of one case into one array, and writes a segmentation to where the case lies in space.
Takes: paths, and the name of a reader as plans.json gives it. Gives: `Image`, `LabelImage`, `Header`.
May touch: image files. One file per reader; each imports its library, and none is imported before it is asked for.
Beyond nnU-Net: damaged files are refused that its libraries read in silence, and a file appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

from trtbuild.errors import ModelError
from trtbuild.spec import Reader
from trtbuild.volume.image import Geometry, Header, Image, LabelImage, Map, Segmentation


class ReaderWriter(Protocol):
    """A reader and its writer; each is a module of this package."""

    def read_image(self, files: Sequence[Path], channels: tuple[str, ...]) -> Image:
        """The image whose channels stand in `files`, in this order; `channels` are the names that the model expects.

        Raises:
            InputError: a file is missing, damaged, of another kind than the reader's, holds NaN or infinity, or does
                not fit the other files; or the number of channels is not the model's.
        """

    def read_segmentation(self, file: Path, *, allow_negative: bool = False) -> LabelImage:
        """The labels of a file, such as a previous stage's prediction or a reference: nnU-Net's read_seg as integers.

        A file of floats is taken where they are whole numbers. Negative values are refused unless `allow_negative`.

        Raises:
            InputError: as `read_image`, or the values are no labels, or there are several channels.
        """

    def image_header(self, files: Sequence[Path], channels: tuple[str, ...]) -> Header | None:
        """What `read_image` would give, without reading a voxel; None where that takes decoding.

        Only the first file is opened. It may still turn out to be damaged, or the others not to fit it.

        Raises:
            InputError: a file is missing, or the header is damaged or of something that the reader does not take.
        """

    def write_segmentation(self, segmentation: Segmentation | Map, geometry: Geometry, path: Path) -> None:
        """Writes a (Z, Y, X) segmentation, as uint8 where its maximum is below 255 and as uint16 otherwise.

        A float32 map of 0 to 1 is written as it is; in PNG and BMP, which hold no floats, as 0 to 65535 and 0 to 254.

        Raises:
            OutputError: the file cannot be written. Then nothing stands under `path` that was not there before.
        """

    def nnunet_properties(self, image: Image) -> dict[str, Any]:
        """What nnU-Net's reader of the same name returns beside the array, in plain Python types."""


def reader_named(name: Reader) -> ReaderWriter:
    """The reader that plans.json names.

    Raises:
        ModelError: nnU-Net has no such reader.
    """
    if name == "SimpleITKIO":
        from trtbuild.volume.io import simpleitk_io

        return simpleitk_io
    if name == "SimpleITKIOWithReorient":
        from trtbuild.volume.io import simpleitk_reorient_io

        return simpleitk_reorient_io
    if name == "NibabelIO":
        from trtbuild.volume.io import nibabel_io

        return nibabel_io
    if name == "NibabelIOWithReorient":
        from trtbuild.volume.io import nibabel_reorient_io

        return nibabel_reorient_io
    if name == "NaturalImage2DIO":
        from trtbuild.volume.io import natural_io

        return natural_io
    if name == "Tiff3DIO":
        from trtbuild.volume.io import tiff3d_io

        return tiff3d_io
    raise ModelError("There is no such image reader.", expected=" | ".join(get_args(Reader)), got=name,
                     where="plans.json: image_reader_writer")  # fmt: skip


def files_beside(name: Reader, path: Path) -> tuple[Path, ...]:
    """The files that the writer of this name makes or replaces beside the segmentation `path`."""
    return (path.with_suffix(".json"),) if name == "Tiff3DIO" else ()


__all__ = ["ReaderWriter", "files_beside", "reader_named"]
