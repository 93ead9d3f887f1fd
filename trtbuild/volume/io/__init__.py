"""Image files <-> arrays, with the semantics of nnU-Net's own readers and writers.

Does: reads the files of one case into one array, and writes a segmentation to where the case lies in space.
Takes: paths, and the name of a reader as plans.json gives it. Gives: `Image`.
May touch: image files. One file per reader; each imports its library, and none is imported before it is asked for.
Beyond nnU-Net: damaged files are refused that its libraries read in silence, and a file appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from trtbuild.errors import ModelError
from trtbuild.spec import Reader
from trtbuild.volume.image import Geometry, Image, Segmentation


class ReaderWriter(Protocol):
    """A reader and its writer; each is a module of this package."""

    def read_image(self, files: Sequence[Path], channels: tuple[str, ...]) -> Image:
        """The image whose channels stand in `files`, in this order; `channels` are the names that the model expects.

        Raises:
            InputError: a file is missing, damaged, of another kind than the reader's, holds NaN or infinity, or does
                not fit the other files; or the number of channels is not the model's.
        """

    def write_segmentation(self, segmentation: Segmentation, geometry: Geometry, path: Path) -> None:
        """Writes a (Z, Y, X) segmentation, as uint8 where its maximum is below 255 and as uint16 otherwise.

        Raises:
            OutputError: the file cannot be written. Then nothing stands under `path` that was not there before.
        """

    def nnunet_properties(self, image: Image) -> dict[str, Any]:
        """What nnU-Net's reader of the same name returns beside the array, in plain Python types."""


def reader_named(name: Reader) -> ReaderWriter:
    """The reader that plans.json names.

    Raises:
        ModelError: nnU-Net has this reader, this version of trtbuild has not.
    """
    if name == "SimpleITKIO":
        from trtbuild.volume.io import simpleitk_io

        return simpleitk_io
    if name == "NibabelIO":
        from trtbuild.volume.io import nibabel_io

        return nibabel_io
    if name == "NibabelIOWithReorient":
        from trtbuild.volume.io import nibabel_reorient_io

        return nibabel_reorient_io
    if name == "NaturalImage2DIO":
        from trtbuild.volume.io import natural_io

        return natural_io
    raise ModelError(
        f"The image reader {name} is not supported yet.",
        expected="SimpleITKIO, NibabelIO, NibabelIOWithReorient or NaturalImage2DIO",
        got=name,
        where="plans.json: image_reader_writer",
        hint="Predict with nnU-Net itself, or train on images that one of the readers above takes.",
    )


__all__ = ["ReaderWriter", "reader_named"]
