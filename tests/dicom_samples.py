"""Synthetic DICOM series: slices of known values in known places, as a scanner would file them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = np.eye(3)
"""Columns: direction of the rows, of the columns, and the normal."""


def stored_values(shape: tuple[int, int, int] = (5, 6, 7), seed: int = 0, top: int = 4095) -> np.ndarray:
    """Random stored values (Z, Y, X)."""
    return np.random.default_rng(seed).integers(0, top, shape).astype(np.uint16)


def decimal(value: float) -> str:
    """A decimal string of at most 16 characters."""
    return f"{value:.9g}"


def image_header(values: np.ndarray, sop_class: str, series: str, **more: Any) -> Dataset:
    """What single slices and multi-frame images have in common."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop_class
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Müller^Eva", "p1", "19700101", "F"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20240102", "101112", "1", "a1"
    ds.ReferringPhysicianName = ""
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = f"{series}.1", series, f"{series}.2"
    ds.Modality, ds.SeriesDescription, ds.SeriesNumber = "CT", "Thorax 2.5", 3
    ds.Rows, ds.Columns = values.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = values.tobytes()
    ds["PixelData"].VR = "OW"
    for name, value in more.items():
        setattr(ds, name, value)
    return ds


def slice_header(
    values: np.ndarray,
    axes: np.ndarray = AXIAL,
    position: tuple[float, ...] | np.ndarray = (0.0, 0.0, 0.0),
    spacing: tuple[float, float] = (0.7, 0.9),
    series: str = "1.2.3",
    **more: Any,
) -> Dataset:
    """A CT slice (Y, X); `spacing` is the distance of rows and of columns."""
    ds = image_header(values, CTImageStorage, series)
    ds.ImageOrientationPatient = [decimal(v) for v in axes[:, :2].T.ravel()]
    ds.ImagePositionPatient = [decimal(v) for v in position]
    ds.PixelSpacing, ds.SliceThickness = [decimal(v) for v in spacing], "2.5"
    ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
    for name, value in more.items():
        setattr(ds, name, value)
    return ds


def slices(
    values: np.ndarray,
    axes: np.ndarray = AXIAL,
    origin: tuple[float, float, float] = (-10.5, 20.25, 30.125),
    distance: float = 2.5,
    **more: Any,
) -> list[Dataset]:
    """The slices of an image (Z, Y, X), the first at `origin`, each `distance` mm along the normal from the last."""
    return [
        slice_header(plane, axes, np.array(origin) + axes[:, 2] * distance * z, InstanceNumber=z + 1, **more)
        for z, plane in enumerate(values)
    ]


def saved(folder: Path, datasets: list[Dataset], seed: int = 1) -> Path:
    """Writes them under names that say nothing about their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ds in zip(np.random.default_rng(seed).permutation(len(datasets)), datasets, strict=True):
        ds.save_as(folder / f"I{name:04d}.dcm", enforce_file_format=True)
    return folder


def enhanced(
    values: np.ndarray,
    axes: np.ndarray = AXIAL,
    origin: tuple[float, float, float] = (-10.5, 20.25, 30.125),
    distance: float = 2.5,
    slopes: tuple[float, ...] = (),
    order: tuple[int, ...] = (),
) -> Dataset:
    """An enhanced CT image of (Z, Y, X) in one file, its frames in this `order`."""
    frames = order or tuple(range(len(values)))
    ds = image_header(values[list(frames)], EnhancedCTImageStorage, "1.2.4", NumberOfFrames=len(values))
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [decimal(v) for v in axes[:, :2].T.ravel()]
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = ["0.7", "0.9"]
    shared.PixelMeasuresSequence[0].SliceThickness = "2.5"
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    ds.DimensionOrganizationSequence, ds.DimensionIndexSequence = [Dataset()], []
    ds.DimensionOrganizationSequence[0].DimensionOrganizationUID = "1.2.4.9"
    for z in frames:
        frame = Dataset()
        frame.FrameContentSequence = [Dataset()]
        frame.PlanePositionSequence = [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = [
            decimal(v) for v in np.array(origin) + axes[:, 2] * distance * z
        ]
        frame.PixelValueTransformationSequence = [Dataset()]
        frame.PixelValueTransformationSequence[0].RescaleSlope = decimal(slopes[z] if slopes else 1)
        frame.PixelValueTransformationSequence[0].RescaleIntercept = "-1024"
        frame.PixelValueTransformationSequence[0].RescaleType = "HU"
        ds.PerFrameFunctionalGroupsSequence.append(frame)
    return ds
