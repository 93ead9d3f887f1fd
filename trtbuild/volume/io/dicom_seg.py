"""A segmentation as DICOM-SEG: one object that refers to the series it was made from, with highdicom."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import trtbuild
from trtbuild.errors import CaseNotWritable, InputError, MissingExtra, OutputError
from trtbuild.volume.image import Geometry, ItkGeometry, NibabelGeometry, ReorientedGeometry, Segmentation
from trtbuild.volume.io.dicom_files import header_from_file
from trtbuild.volume.io.dicom_grid import Slice, grid_from_slices
from trtbuild.volume.io.dicom_headers import slices_from_folder
from trtbuild.volume.io.foreign import written
from trtbuild.volume.io.turn import turned_back

LONGEST = 64
"""Characters of a DICOM long string (LO), which a segment label is."""
NEAR = 0.05
"""How far, in voxels, a corner may lie from its place in the series; NIfTI's float32 moves it by a thousandth."""
MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
                "StudyTime", "ReferringPhysicianName")  # fmt: skip
"""Attributes of type 2 in the patient and study modules (DICOM PS3.3 C.7.1.1, C.7.2.1)."""
SERIES_OFFSET = 1000
"""Added to the number of the series, so that viewers list the segmentation behind what the scanner made."""


def write_dicom_seg(
    segmentation: Segmentation,
    geometry: Geometry,
    folder: Path,
    labels: Mapping[str, tuple[int, ...]],
    path: Path,
    *,
    bundle: str,
) -> None:
    """Writes a segmentation as a DICOM-SEG of type BINARY, which refers to every slice of the series.

    Every label is a segment, also where no voxel has it: that says that it was looked for. Segments may overlap, as
    regions do. What the labels mean anatomically is not known, so the property type is a private code (scheme
    99TRTBUILD) that carries the label's name, of the category "Tissue". BINARY and not LABELMAP, because viewers
    that know the latter are new.

    The UIDs of series and object follow from the series, the bundle and the voxels, so a second run makes no second
    object; the dates in it are those of the writing.

    Args:
        segmentation: (Z, Y, X), axes as the model's reader gave them.
        geometry: that of the `Image`, read from the series itself or from its NIfTI conversion.
        folder: the files of the series.
        labels: names of the segments and the label values that each covers; a name that covers only 0 is left out.
        path: the file, such as case.dcm.
        bundle: identity of the model, which stands in the algorithm's parameters.

    Raises:
        InputError: the series in `folder` cannot be used (see `read_series`).
        CaseNotWritable: the segmentation does not lie on the grid of the series, or holds values without a name.
        OutputError: a name does not fit, or the file cannot be written.
        MissingExtra: highdicom or pydicom is not installed.
    """
    ordered, place = grid_from_slices(slices_from_folder(folder)[0])
    if ordered[0].space is None:
        raise InputError("The series has no frame of reference, so nothing can refer to its space.",
                         expected="FrameOfReferenceUID", where=ordered[0].file,
                         hint="Write the segmentation as NIfTI.")  # fmt: skip
    voxels, where = _in_file_order(segmentation, geometry)
    _require_same_grid(voxels, where, (len(ordered), *ordered[0].shape), place, path)
    segments = _segments(voxels, labels, path)
    sources = [_source(file) for file in dict.fromkeys(one.file for one in ordered)]
    with written(path) as temporary:
        _object(voxels, ordered, sources, segments, bundle).save_as(temporary)


def _source(file: Path) -> Any:
    """The header of a file, with what may be empty but has to be there: anonymised series often lack it."""
    header = header_from_file(file, None)
    for name in MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, "")
    return header


def _in_file_order(segmentation: Segmentation, geometry: Geometry) -> tuple[Segmentation, ItkGeometry]:
    """The voxels in the axes of the file that the reader had before it, and where that lies."""
    if isinstance(geometry, ItkGeometry):
        return segmentation, geometry
    if isinstance(geometry, ReorientedGeometry):
        turned, original = (np.reshape(g.direction, (-1, 3)) for g in (geometry.turned, geometry.original))
        return turned_back(segmentation, turned, original), geometry.original
    if isinstance(geometry, NibabelGeometry):
        affine = np.array(geometry.original_affine)
        steps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3, :3]
        spacing = np.linalg.norm(steps, axis=0)
        origin = affine[:3, 3] * [-1.0, -1.0, 1.0]
        place = ItkGeometry(spacing=tuple(spacing.tolist()), origin=tuple(origin.tolist()),
                            direction=tuple((steps / spacing).ravel().tolist()))  # fmt: skip
        return turned_back(segmentation, np.array(geometry.affine)[:3, :3], affine[:3, :3]), place
    raise TypeError(f"{type(geometry).__name__} has no place in space")


def _require_same_grid(
    voxels: Segmentation, where: ItkGeometry, shape: tuple[int, ...], place: ItkGeometry, path: Path
) -> None:
    """Shape and all corners must be those of the series: an image is 3-D here, or it has another shape."""
    hint = "Name the series that this case was made from."
    if voxels.shape != shape or where.dimension != 3:
        raise CaseNotWritable("The segmentation has another shape than the series.", expected=f"{shape} (z, y, x)",
                              got=voxels.shape, where=path, hint=hint)  # fmt: skip
    last = np.array(shape[::-1]) - 1
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * last
    away = float(np.abs((_points(where, corners) - _points(place, corners)) @ np.reshape(place.direction, (3, 3))
                        / place.spacing).max())  # fmt: skip
    if not away <= NEAR:
        raise CaseNotWritable("The segmentation lies elsewhere than the series.",
                              expected=f"origin {place.origin}, spacing {place.spacing}, direction {place.direction}",
                              got=f"origin {where.origin}, spacing {where.spacing}, direction {where.direction}",
                              where=path, hint=hint)  # fmt: skip


def _points(place: ItkGeometry, indices: Any) -> Any:
    """Millimetres of voxel indices (n, 3) in x, y, z order."""
    return (indices * place.spacing) @ np.reshape(place.direction, (3, 3)).T + place.origin


def _segments(voxels: Segmentation, labels: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, tuple[int, ...]]:
    """The labels that become segments, once it is sure that every voxel has one of them or is 0."""
    segments = {name: values for name, values in labels.items() if set(values) != {0}}
    for name in segments:
        if not name.strip() or len(name) > LONGEST or "\\" in name or not name.isprintable():
            raise OutputError("A label has a name that DICOM cannot hold.", got=repr(name), where=path,
                              expected=f"1 to {LONGEST} characters, no backslash")  # fmt: skip
    nameless = set(np.unique(voxels).tolist()) - {0, *(value for values in segments.values() for value in values)}
    if nameless:
        raise CaseNotWritable("The segmentation holds values that no label names.", where=path, got=sorted(nameless),
                              expected=segments)  # fmt: skip
    if not segments:
        raise OutputError("There is no label to write.", where=path, got=", ".join(labels) or "no labels")
    return segments


def _object(
    voxels: Segmentation,
    ordered: Sequence[Slice],
    sources: list[Any],
    segments: dict[str, tuple[int, ...]],
    bundle: str,
) -> Any:
    """The highdicom.seg.Segmentation."""
    try:
        import highdicom
        from pydicom.sr.codedict import codes
    except ImportError as error:
        raise MissingExtra("highdicom", "dicom", "write DICOM-SEG") from error
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="trtbuild",
        version=trtbuild.__version__,
        family=codes.DCM.ArtificialIntelligence,
        parameters={"bundle": bundle},
    )
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=highdicom.sr.CodedConcept(
                value=f"L{'-'.join(map(str, values))}"[:16], scheme_designator="99TRTBUILD", meaning=name
            ),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, (name, values) in enumerate(segments.items(), start=1)
    ]
    content = hashlib.sha256(np.ascontiguousarray(voxels, dtype="<u2").data).hexdigest()
    about = (str(sources[0].SeriesInstanceUID), bundle, repr(segments), content)
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=_in_frame_order(_pixels(voxels, segments), ordered),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=_uid("series", *about),
        series_number=int(sources[0].get("SeriesNumber") or 0) + SERIES_OFFSET,
        sop_instance_uid=_uid("object", *about),
        instance_number=1,
        manufacturer="trtbuild",
        manufacturer_model_name="trtbuild",
        software_versions=trtbuild.__version__,
        device_serial_number=bundle[:LONGEST],
        series_description="trtbuild segmentation",
        specific_character_set="ISO_IR 192",  # UTF-8: label names have all letters, those of the source few
    )


def _pixels(voxels: Segmentation, segments: dict[str, tuple[int, ...]]) -> Any:
    """What highdicom takes: segment numbers (Z, Y, X), or yes and no (Z, Y, X, S) where segments share a value."""
    values = [value for covered in segments.values() for value in covered]
    if len(values) == len(set(values)):
        table = np.zeros(max(int(voxels.max()), *values) + 1, np.uint16 if len(segments) > 255 else np.uint8)
        for number, covered in enumerate(segments.values(), start=1):
            table[list(covered)] = number
        return table[voxels]
    return np.stack([np.isin(voxels, covered) for covered in segments.values()], axis=-1).astype(np.uint8)


def _in_frame_order(pixels: Any, ordered: Sequence[Slice]) -> Any:
    """A multi-frame file expects its frames in the order in which it holds them; files come in that of `ordered`."""
    if len(ordered) > 1 and len({one.file for one in ordered}) == 1:
        return pixels[np.argsort([one.frame for one in ordered])]
    return pixels


def _uid(*parts: str) -> str:
    """A UID made of a name-based UUID (DICOM PS3.5 B.2), the same for the same parts."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, chr(0).join(parts)).int}"
