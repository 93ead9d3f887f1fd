"""Bad image files and bad places to write: one clear error each, no silent voxels, nothing half-written."""

from __future__ import annotations

import gzip
import itertools
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtbuild.errors import CaseNotWritable, InputError, ModelError, OutOfMemory, OutputError
from trtbuild.spec import Reader
from trtbuild.steps.folder_run.flow import CASE_ERRORS
from trtbuild.volume.image import ItkGeometry, NibabelGeometry, PixelGeometry, ReorientedGeometry, TiffGeometry
from trtbuild.volume.io import files_beside, foreign, nibabel_io, reader_named, simpleitk_io, sound
from trtbuild.volume.io.sound import require_sound
from trtbuild.volume.resampling.image import new_shape

SHAPE = (9, 10, 11)
GEOMETRY = ItkGeometry(spacing=(1.0, 1.0, 2.0), origin=(0.0, 0.0, 0.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1))
AFFINE = tuple(tuple(row) for row in np.eye(4).tolist())
GEOMETRIES = {
    "SimpleITKIO": GEOMETRY,
    "SimpleITKIOWithReorient": ReorientedGeometry(original=GEOMETRY, turned=GEOMETRY, orientation="LPS"),
    "NibabelIO": NibabelGeometry(original_affine=AFFINE, affine=AFFINE),
    "NibabelIOWithReorient": NibabelGeometry(original_affine=AFFINE, affine=AFFINE),
    "NaturalImage2DIO": PixelGeometry(),
    "Tiff3DIO": TiffGeometry(spacing=(2, 1, 1)),
}
READS: list[tuple[Reader, str]] = [
    *(("SimpleITKIO", ending) for ending in (".nii.gz", ".nii", ".mha", ".nrrd", ".gipl", ".gipl.gz")),
    *(("SimpleITKIOWithReorient", ending) for ending in (".nii.gz", ".mha")),
    *itertools.product(("NibabelIO", "NibabelIOWithReorient"), (".nii.gz", ".nii")),
    *(("NaturalImage2DIO", ending) for ending in (".png", ".bmp", ".tif")),
    ("Tiff3DIO", ".tiff"),
]  # type: ignore[list-item]
WRITES = [*READS, ("SimpleITKIO", ".nii")]


def noise(shape: tuple[int, ...] = SHAPE, seed: int = 0, dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def saved(file: Path, values: np.ndarray | None = None) -> Path:
    """An image file of the kind that the ending says."""
    values = noise() if values is None else values
    if file.suffix in (".png", ".bmp", ".tif"):
        picture = values[0].astype(np.uint8)
        tifffile.imwrite(file, picture) if file.suffix == ".tif" else sitk.WriteImage(
            sitk.GetImageFromArray(picture), str(file)
        )
    elif file.suffix == ".tiff":
        tifffile.imwrite(file, values, photometric="minisblack")
    else:
        sitk.WriteImage(sitk.GetImageFromArray(values), str(file), True)
    return file


def refusal(reader: Reader, *files: Path, channels: tuple[str, ...] = ("c",)) -> InputError:
    """The InputError that reading raises."""
    with pytest.raises(InputError) as error:
        reader_named(reader).read_image(files, channels)
    return error.value


def image_or_error(reader: Reader, file: Path) -> np.ndarray | InputError:
    """The array that reading gives, or the InputError that it raises."""
    try:
        return reader_named(reader).read_image([file], ("c",)).data
    except InputError as error:
        return error


@pytest.mark.parametrize(("reader", "ending"), READS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.97])
def test_a_truncated_file_is_refused(tmp_path: Path, reader: Reader, ending: str, share: float) -> None:
    file = saved(tmp_path / f"a_0000{ending}", noise((9, 50, 60)))
    content = file.read_bytes()
    reader_named(reader).read_image([file], ("c",))
    file.write_bytes(content[: int(len(content) * share)])
    assert refusal(reader, file).where == file


@pytest.mark.parametrize(("reader", "ending"), [r for r in READS if r[1] in (".nii.gz", ".mha", ".nrrd", ".gipl.gz")])
def test_damage_in_compressed_data_never_changes_voxels_in_silence(tmp_path: Path, reader: Reader, ending: str) -> None:
    file = saved(tmp_path / f"a_0000{ending}", noise((20, 40, 50)))
    content = file.read_bytes()
    whole = reader_named(reader).read_image([file], ("c",)).data
    refused = 0
    for position in np.linspace(len(content) // 4, len(content) - 9, 23).astype(int):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        file.write_bytes(damaged)
        result = image_or_error(reader, file)
        if isinstance(result, InputError):
            refused += 1
            assert result.where == file
        else:
            np.testing.assert_array_equal(result, whole)
    assert refused >= 20


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(READS), st.data())
def test_whatever_the_bytes_are_there_is_an_image_or_an_input_error(
    tmp_path: Path, kind: tuple[Reader, str], data: st.DataObject
) -> None:
    reader, ending = kind
    file = saved(tmp_path / f"a_0000{ending}", noise((2, 3, 4)))
    content = bytearray(file.read_bytes())
    packed = ending == ".nii.gz"
    if packed:
        content = bytearray(gzip.decompress(content))
    for position in data.draw(st.lists(st.integers(0, min(len(content), 360) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(gzip.compress(bytes(content)) if packed else content)
    try:
        image = reader_named(reader).read_image([file], ("c",))
    except (InputError, OutOfMemory):
        return
    assert image.data.ndim == 4
    assert np.isfinite(image.data).all()


def test_a_header_that_claims_an_absurd_shape_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    saved(tmp_path / "a_0000.nii.gz")
    nifti = bytearray(gzip.decompress((tmp_path / "a_0000.nii.gz").read_bytes()))
    struct.pack_into("<3h", nifti, 42, 3000, 2500, 1000)
    (tmp_path / "a_0000.nii").write_bytes(nifti)
    (tmp_path / "a_0000.nii.gz").write_bytes(gzip.compress(bytes(nifti)))
    for ending in (".mha", ".nrrd"):
        file = saved(tmp_path / f"a_0000{ending}")
        content = file.read_bytes()
        assert b"11 10 9\n" in content
        file.write_bytes(content.replace(b"11 10 9\n", b"3000 2500 1000\n"))
    file = saved(tmp_path / "a_0000.gipl")
    gipl = bytearray(file.read_bytes())
    struct.pack_into(">3H", gipl, 0, 3000, 2500, 1000)
    file.write_bytes(gipl)
    code = """
        import sys
        from pathlib import Path
        from trtbuild.errors import InputError
        from trtbuild.volume.io import reader_named
        folder = Path(sys.argv[1])
        for file in sorted(folder.iterdir()):
            for reader in ("SimpleITKIO", "NibabelIO") if ".nii" in file.name else ("SimpleITKIO",):
                try:
                    reader_named(reader).read_image([file], ("c",))
                except InputError as error:
                    print(error.what, error.expected, error.got)
        # not ru_maxrss, which starts with what the parent process had
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=True
    )
    *errors, peak = done.stdout.splitlines()
    assert len(errors) == 7
    assert all("truncated" in error and "15000000" in error for error in errors)
    assert int(peak) < 1_000_000  # KiB; ITK alone takes 15 GB


def test_a_compressed_stream_may_have_members_padding_and_any_length(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.nii.gz"
    content = bytes(nibabel.Nifti1Image(noise((64, 128, 64)), np.eye(4)).to_bytes())
    assert len(content) > sound.CHUNK
    whole = gzip.compress(content)
    parts = b"".join(gzip.compress(content[i : i + 100_000]) for i in range(0, len(content), 100_000))
    zeros = gzip.compress(content + bytes(2 * sound.CHUNK))
    for stream in (whole, parts, whole + bytes(512), whole + b"garbage", whole + b"\x1f", zeros):
        file.write_bytes(stream)
        require_sound(file)
    for stream in (parts[: len(parts) // 2], whole[:-1], whole[:-8], b"\x1f\x8b", parts[:-5]):
        file.write_bytes(stream)
        with pytest.raises(InputError):
            require_sound(file)


@pytest.mark.parametrize("length", [0, 1, sound.CHUNK - 1, sound.CHUNK, sound.CHUNK + 1, 3 * sound.CHUNK])
def test_lengths_around_the_chunk_are_counted_exactly(tmp_path: Path, length: int) -> None:
    file = tmp_path / "a.mha"
    header = b"ObjectType = Image\nNDims = 1\nCompressedData = True\nElementDataFile = LOCAL\n"
    file.write_bytes(header + zlib.compress(bytes(length)))
    require_sound(file, length)
    with pytest.raises(InputError) as error:
        require_sound(file, length + 1)
    assert (error.value.expected, error.value.got) == (f"{length + 1} bytes", f"{length} bytes")


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_a_header_that_points_to_another_file_is_left_to_itk(tmp_path: Path, ending: str) -> None:
    file = saved(tmp_path / f"a_0000{ending}")
    image = reader_named("SimpleITKIO").read_image([file], ("c",))
    np.testing.assert_array_equal(image.data[0], noise())


def gzip_member(content: bytes, size: int) -> bytes:
    """A gzip member of exactly this size; its file name makes up the difference."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packer.compress(content) + packer.flush() + struct.pack("<2I", zlib.crc32(content), len(content))
    return b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (size - len(body) - 11) + b"\0" + body


@pytest.mark.parametrize("size", range(sound.CHUNK - 3, sound.CHUNK + 2))
def test_a_member_may_begin_anywhere_around_the_end_of_a_block(tmp_path: Path, size: int) -> None:
    content = bytes(nibabel.Nifti1Image(noise(), np.eye(4)).to_bytes())
    file = tmp_path / "a.nii.gz"
    first = gzip_member(content[:500], size)
    assert len(first) == size
    file.write_bytes(first + gzip.compress(content[500:]))
    require_sound(file)
    file.write_bytes(first)
    with pytest.raises(InputError, match="truncated"):
        require_sound(file)


def test_data_that_unpacks_to_much_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.nii.gz"
    file.write_bytes(
        gzip.compress(bytes(nibabel.Nifti1Image(np.zeros((400, 400, 400), np.uint8), np.eye(4)).to_bytes()))
    )
    tracemalloc.start()
    require_sound(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * sound.CHUNK


@pytest.mark.parametrize("encoding", ["raw", "ascii", "text"])
def test_other_encodings_of_nrrd_are_read(tmp_path: Path, encoding: str) -> None:
    values = noise((2, 3, 4), dtype=np.float64)
    header = f"NRRD0004\ntype: double\ndimension: 3\nsizes: 4 3 2\nendian: little\nencoding: {encoding}\n\n"
    body = values.tobytes() if encoding == "raw" else " ".join(f"{v:g}" for v in values.ravel()).encode()
    file = tmp_path / "a_0000.nrrd"
    file.write_bytes(header.encode() + body)
    np.testing.assert_array_equal(reader_named("SimpleITKIO").read_image([file], ("c",)).data[0], values)


def test_metaimage_as_text_is_read(tmp_path: Path) -> None:
    values = noise((2, 3, 4), dtype=np.float64)
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = False\nElementSpacing = 1 1 1\nDimSize = 4 3 2\n"
        "ElementType = MET_DOUBLE\nElementDataFile = LOCAL\n"
    )
    file = tmp_path / "a_0000.mha"
    file.write_text(header + " ".join(f"{v:g}" for v in values.ravel()) + "\n")
    np.testing.assert_array_equal(reader_named("SimpleITKIO").read_image([file], ("c",)).data[0], values)


@pytest.mark.parametrize(("reader", "ending"), READS)
def test_something_else_under_the_right_name_is_refused(tmp_path: Path, reader: Reader, ending: str) -> None:
    file = tmp_path / f"a_0000{ending}"
    for content in (b"", b"hello", b"\0" * 1000, b"<html>" * 500, b"\x1f\x8b\x08" + b"\0" * 20):
        file.write_bytes(content)
        error = refusal(reader, file)
        assert error.where == file
        assert error.got


@pytest.mark.parametrize("reader", list(GEOMETRIES))
def test_a_missing_file_and_a_folder_are_named_before_anything_is_read(tmp_path: Path, reader: Reader) -> None:
    error = refusal(reader, tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz", channels=("T1", "T2"))
    assert error.where == tmp_path / "a_0000.nii.gz"
    assert error.expected == "a_0000.nii.gz (T1), a_0001.nii.gz (T2)"
    assert refusal(reader, tmp_path).got == "a folder"
    assert "no files" in refusal(reader).what


FLOATS = [
    ("SimpleITKIO", ".nii.gz"),
    ("SimpleITKIO", ".mha"),
    ("NibabelIO", ".nii.gz"),
    ("NibabelIOWithReorient", ".nii"),
]


@pytest.mark.parametrize(("reader", "ending"), FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_nan_and_infinity_are_counted_and_located(tmp_path: Path, reader: Reader, ending: str, bad: float) -> None:
    values = noise().astype(np.float64)
    values[3, 4, 5] = values[8, 0, 1] = bad
    clean, file = saved(tmp_path / f"a_0000{ending}"), saved(tmp_path / f"a_0001{ending}", values)
    error = refusal(reader, clean, file, channels=("T1", "T2"))
    assert error.where == file
    assert "2 such voxels" in str(error.got)
    # What float32 cannot hold is found after reorienting: ITK writes LPS, and so x and y are turned.
    turned = bad == 1e300 and reader == "NibabelIOWithReorient"
    assert str((3, 5, 5) if turned else (3, 4, 5)) in str(error.got)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("order", "dtype"), [("<", "f4"), (">", "f4"), ("<", "f8")])
def test_nan_is_found_wherever_blocks_begin_and_only_among_the_voxels(
    tmp_path: Path, ending: str, order: str, dtype: str
) -> None:
    shape, start = (90, 80, 70), 357
    values = np.ones(shape, order + dtype)
    image = nibabel.Nifti1Image(values.T, np.eye(4))
    header = image.header.as_byteswapped(order)
    header["vox_offset"], header["magic"] = start, b"n+1"
    per_block = sound.CHUNK // values.itemsize
    where = [0, per_block - 90, per_block, values.size - 1]
    for count in range(len(where) + 1):
        flat = values.copy().ravel()
        flat[where[len(where) - count :]] = np.nan
        behind = np.full(9, np.nan, order + dtype).tobytes()
        content = header.binaryblock + bytes(start - 348) + flat.tobytes() + behind
        file = tmp_path / f"a_0000{ending}"
        file.write_bytes(gzip.compress(content, 1) if ending == ".nii.gz" else content)
        if count == 0:
            require_sound(file)
            continue
        with pytest.raises(InputError) as error:
            require_sound(file)
        first = tuple(map(int, np.unravel_index(where[len(where) - count], shape)))
        assert error.value.got == f"{count} such voxels, the first at (z, y, x) = {first}"


def test_nan_in_a_tif_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.tif"
    tifffile.imwrite(file, np.array([[1.0, np.nan], [0.0, 2.0]], np.float32))
    assert "(0, 0, 1)" in str(refusal("NaturalImage2DIO", file).got)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_the_number_of_channels_must_be_the_models(tmp_path: Path, reader: Reader) -> None:
    files = [saved(tmp_path / f"pat.7_{i:04d}.nii.gz", noise(seed=i)) for i in range(3)]
    for given_files in (files[:1], files):
        error = refusal(reader, *given_files, channels=("T1", "T2"))
        assert "wrong number of channels" in error.what
        assert error.expected == "2: T1, T2"
        assert str(error.got).startswith(f"{len(given_files)}, 1 in each of")
        assert "pat.7_0000.nii.gz (T1), pat.7_0001.nii.gz (T2)" in str(error.hint)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_channels_of_another_shape_or_spacing_are_refused_by_name(tmp_path: Path, reader: Reader) -> None:
    first = saved(tmp_path / "a_0000.nii.gz")
    shape, spacing = saved(tmp_path / "b_0001.nii.gz", noise((9, 10, 12))), tmp_path / "c_0001.nii.gz"
    image = sitk.GetImageFromArray(noise())
    image.SetSpacing((1.0, 1.0, 1.01))
    sitk.WriteImage(image, str(spacing))
    for other, what, got in ((shape, "shape", "(1, 9, 10, 12)"), (spacing, "spacing", "1.01")):
        error = refusal(reader, first, other, channels=("T1", "T2"))
        assert what in error.what
        assert error.where == other
        assert first.name in str(error.expected)
        assert got in str(error.got)


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient"])
def test_an_empty_axis_and_a_spacing_of_nan_are_refused(tmp_path: Path, reader: Reader) -> None:
    file = tmp_path / "a_0000.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 0, 3), np.int16), np.eye(4)), file)
    assert "empty" in refusal(reader, file).what
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 3), np.int16), np.eye(4)), file)
    content = bytearray(file.read_bytes())
    content[80:84] = struct.pack("<f", np.nan)  # pixdim[1]
    file.write_bytes(content)
    assert "spacing" in refusal("NibabelIO", file).what


def test_a_reader_that_nnunet_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="no such image reader") as error:
        reader_named("MyReader")  # type: ignore[arg-type]
    assert error.value.got == "MyReader"
    assert "Tiff3DIO" in str(error.value.expected)


# --- writing ---------------------------------------------------------------------------------------------------------


def labels_for(reader: Reader, shape: tuple[int, int, int] = (20, 60, 70)) -> np.ndarray:
    values = noise(shape)
    return values[:1] if reader == "NaturalImage2DIO" else values


@pytest.mark.parametrize("limit", [0, 100, 300, 2000])
def test_a_full_disk_is_an_error_and_leaves_nothing_behind(tmp_path: Path, limit: int) -> None:
    # A limit on the size of files stands for the full disk: ITK notices neither when it writes NIfTI or GIPL.
    old = {f"{reader}{ending}": b"old" for reader, ending in WRITES}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    code = f"""
        import resource, sys
        from pathlib import Path
        import test_io_faults as t
        from trtbuild.errors import OutputError
        from trtbuild.volume.io import reader_named
        readers = [(reader_named(reader), reader, ending) for reader, ending in t.WRITES]
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        for module, reader, ending in readers:
            path = Path(sys.argv[1]) / f"{{reader}}{{ending}}"
            try:
                module.write_segmentation(t.labels_for(reader), t.GEOMETRIES[reader], path)
            except OutputError as error:
                assert type(error) is OutputError, error  # and not an error of the case
                sys.stderr.write(f"{{reader}}{{ending}} refused\\n")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parent)  # fmt: skip
    assert {line.split()[0] for line in done.stderr.splitlines() if line.endswith(" refused")} == set(old)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


@pytest.mark.parametrize(("reader", "ending"), WRITES)
def test_an_existing_file_is_replaced_and_no_temporary_stays(tmp_path: Path, reader: Reader, ending: str) -> None:
    path = tmp_path / f"case.1{ending}"
    path.write_bytes(b"old")
    reader_named(reader).write_segmentation(labels_for(reader), GEOMETRIES[reader], path)
    assert path.stat().st_size > 1000
    assert set(tmp_path.iterdir()) == {path, *files_beside(reader, path)}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(("reader", "ending"), READS)
def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path, reader: Reader, ending: str) -> None:
    (tmp_path / f"folder{ending}").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "missing" / f"a{ending}", tmp_path / f"folder{ending}", tmp_path / "file" / f"a{ending}"):
        with pytest.raises(OutputError) as error:
            reader_named(reader).write_segmentation(labels_for(reader), GEOMETRIES[reader], path)
        assert error.value.where == path
    # the spacing of a stack comes before the stack, and stays where only the last step, the renaming, fails
    stays = {file.name for file in files_beside(reader, tmp_path / f"folder{ending}")}
    assert {file.name for file in tmp_path.iterdir()} == {"file", f"folder{ending}", *stays}


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device"), MemoryError]
)
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | OSError
) -> None:
    def half(image: object, path: object, *_: object) -> None:
        Path(str(path)).write_bytes(b"half")
        raise error

    monkeypatch.setattr(simpleitk_io.sitk, "WriteImage", half)
    monkeypatch.setattr(nibabel_io.nibabel, "save", half)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"old")
    expected = {KeyboardInterrupt: KeyboardInterrupt, MemoryError: OutOfMemory}.get(error, OutputError)  # type: ignore[arg-type]
    for reader in ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"):
        with pytest.raises(expected):
            reader_named(reader).write_segmentation(labels_for("NibabelIO"), GEOMETRIES[reader], path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.nii.gz": b"old"}


@pytest.mark.parametrize("value", [-1, 65536])
def test_labels_that_do_not_fit_are_refused_instead_of_wrapped(tmp_path: Path, value: int) -> None:
    labels = labels_for("SimpleITKIO").astype(np.int32)
    labels[0, 0, 0] = value
    with pytest.raises(CaseNotWritable, match=str(value)):
        reader_named("SimpleITKIO").write_segmentation(labels, GEOMETRY, tmp_path / "a.nii.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("reader", "ending"), [("SimpleITKIO", ".mhd"), ("SimpleITKIO", ".nhdr"),
                                                ("NibabelIO", ".img"), ("SimpleITKIO", ".xyz")])  # fmt: skip
def test_endings_that_cannot_appear_whole_or_are_unknown_are_refused(
    tmp_path: Path, reader: Reader, ending: str
) -> None:
    with pytest.raises(OutputError):
        reader_named(reader).write_segmentation(labels_for(reader), GEOMETRIES[reader], tmp_path / f"a{ending}")
    assert list(tmp_path.iterdir()) == []


def refused(*_: object) -> None:
    raise RuntimeError("Bad direction, determinant is 0")


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_what_a_library_refuses_to_write_fails_the_case_and_what_the_disk_refuses_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    monkeypatch.setattr(simpleitk_io.sitk, "WriteImage", refused)
    monkeypatch.setattr(nibabel_io.nibabel, "save", refused)
    assert issubclass(CaseNotWritable, CASE_ERRORS)
    assert not issubclass(OutputError, CASE_ERRORS)
    path = tmp_path / "a.nii.gz"
    with pytest.raises(CaseNotWritable, match="determinant"):
        reader_named(reader).write_segmentation(labels_for(reader), GEOMETRIES[reader], path)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(foreign.os, "fsync", lambda stream: (_ for _ in ()).throw(full))
    with pytest.raises(OutputError) as error:
        reader_named(reader).write_segmentation(labels_for(reader), GEOMETRIES[reader], path)
    assert type(error.value) is OutputError
    assert list(tmp_path.iterdir()) == []


def test_labels_beyond_bmp_fail_the_case(tmp_path: Path) -> None:
    with pytest.raises(CaseNotWritable, match="BMP"):
        reader_named("NaturalImage2DIO").write_segmentation(
            np.full((1, 4, 5), 300, np.uint16), PixelGeometry(), tmp_path / "a.bmp"
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_a_grid_of_no_spacing_is_an_input_error(bad: float) -> None:
    for axis in range(3):
        spacing = tuple(bad if axis == other else 1.0 for other in range(3))
        with pytest.raises(InputError, match="spacing is not usable"):
            new_shape((4, 5, 6), spacing, (1.0, 1.0, 1.0))
