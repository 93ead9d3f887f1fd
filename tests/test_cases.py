"""Which files belong to which case: folders as nnU-Net reads them, image files, case lists."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from dicom_samples import saved, slices, stored_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from trtbuild.errors import InputError
from trtbuild.volume.cases import Case, cases_from_input, part_of
from trtbuild.volume.io import reader_named
from trtbuild.volume.io.dicom_io import read_series

END = ".nii.gz"


def touched(folder: Path, *names: str) -> list[Path]:
    """Empty files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def ids_and_names(cases: Sequence[Case]) -> dict[str, list[str]]:
    return {case.id: [file.name for file in case.files] for case in cases}


def refusal(*inputs: Path, ending: str = END) -> InputError:
    with pytest.raises(InputError) as error:
        cases_from_input(inputs, ending)
    return error.value


@pytest.mark.parity
def test_a_folder_gives_the_cases_files_and_order_of_nnunet(tmp_path: Path) -> None:
    names = ["b", "a", "a_1", "a_10", "a_2", "B", "case.7", "x_0001", "é"]
    touched(tmp_path, *(f"{name}_{i:04d}{END}" for name in names for i in range(3)), "notes.txt", "other.nii")
    (tmp_path / f"folder_0000{END}").mkdir()
    theirs = create_lists_from_splitted_dataset_folder(str(tmp_path), END, num_processes=1)
    ours = cases_from_input([tmp_path], END)
    assert [[str(file) for file in case.files] for case in ours] == theirs
    assert [case.output_name(END) for case in ours] == [Path(files[0]).name[: -len(END) - 5] + END for files in theirs]


@pytest.mark.parity
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.from_regex(r"[A-Za-z][A-Za-z0-9_. -]{0,8}", fullmatch=True), st.integers(1, 3), min_size=1))
def test_any_names_are_grouped_as_by_nnunet(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, int]) -> None:
    folder = tmp_path_factory.mktemp("f")
    touched(folder, *(f"{name}_{i:04d}.png" for name, count in cases.items() for i in range(count)))
    theirs = create_lists_from_splitted_dataset_folder(str(folder), ".png", num_processes=1)
    assert [[str(file) for file in case.files] for case in cases_from_input([folder], ".png")] == theirs


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    touched(tmp_path, f"a_0000{END}", f"._a_0000{END}", f".x.partial{END}")
    assert ids_and_names(cases_from_input([tmp_path], END)) == {"a": [f"a_0000{END}"]}


def test_a_folder_without_images_says_how_they_are_named_and_what_is_there(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert "CASE_0000.nii.gz, CASE_0001.nii.gz" in str(error.expected)
    assert error.got == "no files"
    touched(tmp_path, *(f"{name}_0000.nrrd" for name in "abcd"))
    error = refusal(tmp_path)
    assert error.got == "a_0000.nrrd, b_0000.nrrd, c_0000.nrrd … (4 files)"
    assert "Did you mean the files .nrrd? The model's file_ending is .nii.gz" in str(error.hint)


def test_files_without_channel_number_in_a_folder_are_named(tmp_path: Path) -> None:
    touched(tmp_path, f"a_0000{END}", f"b{END}", f"c_01{END}")
    error = refusal(tmp_path)
    assert error.got == f"b{END}, c_01{END}"
    assert f"rename b{END} to b_0000{END}" in str(error.hint)


def test_a_case_that_lacks_a_channel_fails_alone_when_it_is_read(tmp_path: Path) -> None:
    touched(tmp_path, *(f"a_{i:04d}{END}" for i in (0, 2)), f"b_0000{END}", f"b_0001{END}", f"c_0001{END}")
    cases = cases_from_input([tmp_path], END)
    assert ids_and_names(cases) == {
        "a": [f"a_0000{END}", f"a_0001{END}"],
        "b": [f"b_0000{END}", f"b_0001{END}"],
        "c": [f"c_0000{END}"],
    }
    for case, missing in ((cases[0], f"a_0001{END}"), (cases[2], f"c_0000{END}")):
        with pytest.raises(InputError, match="no such image file") as error:
            reader_named("SimpleITKIO").read_image(case.files, ("T1", "T2", "T3"))
        assert error.value.where == tmp_path / missing
        assert f"{case.id}_0002{END} (T3)" in str(error.value.expected)


def test_a_year_in_the_name_is_not_taken_for_two_thousand_channels(tmp_path: Path) -> None:
    touched(tmp_path, f"pat_2023{END}", f"pat_2024{END}")
    assert ids_and_names(cases_from_input([tmp_path], END)) == {"pat": [f"pat_0000{END}"]}


def test_files_are_grouped_into_cases_and_sorted(tmp_path: Path) -> None:
    files = touched(tmp_path, f"b_0000{END}", f"a_0001{END}", f"b_0001{END}", f"a_0000{END}")
    cases = cases_from_input(files, END)
    assert ids_and_names(cases) == {"a": [f"a_0000{END}", f"a_0001{END}"], "b": [f"b_0000{END}", f"b_0001{END}"]}


def test_files_without_number_are_cases_of_one_channel(tmp_path: Path) -> None:
    files = touched(tmp_path, f"t1{END}", f"a.b{END}")
    cases = cases_from_input(files, END)
    assert ids_and_names(cases) == {"t1": [f"t1{END}"], "a.b": [f"a.b{END}"]}
    assert [case.output_name(END) for case in cases] == [f"t1{END}", f"a.b{END}"]


@pytest.mark.parametrize(("names", "what"), [
    ((f"a_0000{END}", f"a_0002{END}"), "not complete or not in order"),
    ((f"a_0001{END}",), "not complete or not in order"),
    ((f"a_0000{END}", f"b{END}"), "some have none"),
    (("a_0000.nrrd",), "not of the kind"),
    ((END,), "not of the kind"),
    ((f"a_0000{END}", f"a_0000{END}"), "not complete or not in order"),
    ((f"a{END}", f"a{END}"), "both would write the same file"),
    ((f"x/a_0000{END}", f"y/a_0000{END}"), "both would write the same file"),
    ((f"x/a{END}", f"y/a{END}"), "both would write the same file"),
])  # fmt: skip
def test_files_that_do_not_say_what_belongs_together_are_refused(
    tmp_path: Path, names: tuple[str, ...], what: str
) -> None:
    for name in names:
        touched((tmp_path / name).parent, Path(name).name)
    assert what in refusal(*(tmp_path / name for name in names)).what


def test_inputs_that_are_missing_or_of_several_kinds_are_refused(tmp_path: Path) -> None:
    assert "no input" in refusal().what
    assert refusal(tmp_path / "missing").where == tmp_path / "missing"
    (file,) = touched(tmp_path / "f", f"a_0000{END}")
    for other in (tmp_path / "f", *touched(tmp_path, "list.txt", "list.json")):
        assert "different kinds" in refusal(file, other).what
        assert "different kinds" in refusal(other, other).what


def test_a_json_list_holds_lists_of_files_or_ids_with_files(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    entries = [
        [f"z_0000{END}", f"z_0001{END}"],
        {"id": "y", "files": ["t2.nrrd", f"t1{END}"]},
        [f"sub/x{END}"],
        [f"/abs/w_0000{END}"],
    ]
    path.write_text(json.dumps(entries))
    cases = cases_from_input([path], END)
    assert cases == (
        Case(id="z", files=(tmp_path / f"z_0000{END}", tmp_path / f"z_0001{END}")),
        Case(id="y", files=(tmp_path / "t2.nrrd", tmp_path / f"t1{END}")),
        Case(id="x", files=(tmp_path / f"sub/x{END}",)),
        Case(id="w", files=(Path(f"/abs/w_0000{END}"),)),
    )


def test_a_text_list_holds_one_case_per_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(f'\ufeffa_0000{END}  a_0001{END}\r\n\r\n"with blank{END}"\n'.encode())
    assert cases_from_input([path], END) == (
        Case(id="a", files=(tmp_path / f"a_0000{END}", tmp_path / f"a_0001{END}")),
        Case(id="with blank", files=(tmp_path / f"with blank{END}",)),
    )


@pytest.mark.parametrize(("content", "what"), [
    ("", "cannot be read"),
    ("[", "cannot be read"),
    ("[" * 100_000, "cannot be read"),
    ("[]", "no cases"),
    ("{}", "no cases"),
    ('{"id": "a", "files": ["a.nii.gz"]}', "no cases"),
    ("[[]]", "is no case"),
    ("[null]", "is no case"),
    ('["a.nii.gz"]', "is no case"),
    ('[[""]]', "is no case"),
    ("[[1]]", "is no case"),
    ('[{"id": "a"}]', "is no case"),
    ('[{"id": "a", "files": ["a.nii.gz"], "extra": 1}]', "is no case"),
    ('[{"id": "../a", "files": ["a.nii.gz"]}]', "cannot be a file name"),
    ('[{"id": "..", "files": ["a.nii.gz"]}]', "cannot be a file name"),
    ('[{"id": "", "files": ["a.nii.gz"]}]', "cannot be a file name"),
    ('[{"id": "a\\u0000", "files": ["a.nii.gz"]}]', "cannot be a file name"),
    ('[{"id": 7, "files": ["a.nii.gz"]}]', "cannot be a file name"),
    ('[{"id": "\\ud800", "files": ["a.nii.gz"]}]', "cannot be a file name"),
    (json.dumps([{"id": "é" * 125, "files": ["a.nii.gz"]}]), "cannot be a file name"),
    ('[["\\ud800.nii.gz"]]', "is no case"),
    (json.dumps([{"id": "a", "files": ["x" * 300 + ".nii.gz"]}]), "is no case"),
    (json.dumps([["gone/" + "x" * 300 + ".nii.gz"]]), "is no case"),
    ('[["a.nrrd"]]', "not of the kind"),
    ('[["t1.nii.gz", "t2.nii.gz"]]', "do not say which case"),
    ('[["a_0000.nii.gz", "b_0001.nii.gz"]]', "do not say which case"),
    ('[["a_0001.nii.gz", "a_0000.nii.gz"]]', "not complete or not in order"),
    ('[["a_0000.nii.gz"], ["a_0000.nii.gz"]]', "both would write the same file"),
    ('[{"id": "a", "files": ["b.nii.gz", "b.nii.gz"]}]', "has a file twice"),
])  # fmt: skip
def test_a_json_list_that_is_wrong_is_refused_by_the_reason(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    error = refusal(path)
    assert what in error.what
    assert error.got is not None or error.where is not None


def test_a_text_list_that_is_wrong_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"a_0000{END}\nO'Brien{END}\n")
    assert refusal(path).where == f"{path}, line 2"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(path).what
    path.write_text("\n \n")
    assert "no cases" in refusal(path).what


def test_a_listed_file_that_does_not_exist_fails_its_case_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"a_0000{END}")
    (case,) = cases_from_input([path], END)
    with pytest.raises(InputError, match="no such image file"):
        reader_named("NibabelIO").read_image(case.files, ("T1",))


def test_the_longest_id_that_a_file_system_takes_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    name = "é" * 124
    path.write_text(json.dumps([{"id": name, "files": ["a.nii.gz"]}]))
    (case,) = cases_from_input([path], END)
    touched(tmp_path, case.output_name(END))
    assert case.id == name


@pytest.mark.parametrize("target", ["gone", f"a_0000{END}"])
def test_a_link_to_nowhere_is_a_case_that_fails_by_name(tmp_path: Path, target: str) -> None:
    """`target` the second time is the link itself."""
    touched(tmp_path, f"b_0000{END}")
    (tmp_path / f"a_0000{END}").symlink_to(target)
    cases = cases_from_input([tmp_path], END)
    assert [case.id for case in cases] == ["a", "b"]
    with pytest.raises((InputError, RuntimeError), match=f"no such image file|a_0000{END}"):
        reader_named("SimpleITKIO").read_image(cases[0].files, ("T1",))


def test_a_path_that_is_too_long_for_the_system_does_not_exist(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / ("x" * 300)).what


# --- parts, and folders with very many files -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 10])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_parts_are_those_of_nnunet_and_together_the_whole(tmp_path: Path, count: int, num_parts: int) -> None:
    names = [f"p{i}" for i in range(count)]
    if count:
        touched(tmp_path / "f", *(f"{name}_{c:04d}{END}" for name in names for c in range(2)))
        cases = cases_from_input([tmp_path / "f"], END)
        theirs = create_lists_from_splitted_dataset_folder(str(tmp_path / "f"), END, num_processes=1)
    else:
        cases, theirs = (), []
    for cases_of in (cases, tuple(cases)):
        parts = [part_of(cases_of, num_parts, part) for part in range(num_parts)]
        for part, some in enumerate(parts):
            assert [[str(file) for file in case.files] for case in some] == theirs[part::num_parts]
        assert sorted(case.id for some in parts for case in some) == names


@pytest.mark.parametrize(("num_parts", "part_id"), [(0, 0), (1, 1), (3, 3), (3, -1), (-1, 0), (-1, -2)])
def test_a_part_that_does_not_exist_is_refused(num_parts: int, part_id: int) -> None:
    with pytest.raises(InputError, match="no such part"):
        part_of((), num_parts, part_id)


def test_the_cases_of_a_folder_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    names = [f"case_{i:05d}" for i in range(3000)]
    touched(tmp_path, *(f"{name}_0000{END}" for name in names))
    tracemalloc.start()
    cases = cases_from_input([tmp_path], END)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3000 * 130  # bytes: the names themselves take 75 each; a Case and its Path take 540
    assert len(cases) == 3000
    assert cases[-1] == cases[2999] == Case(id="case_02999", files=(tmp_path / f"case_02999_0000{END}",))
    assert [case.id for case in cases] == names
    assert [case.id for case in cases[10:3:-3]] == ["case_00010", "case_00007", "case_00004"]
    assert [case.id for case in cases[5:][2::1000]] == ["case_00007", "case_01007", "case_02007"]
    assert next(reversed(cases)).id == "case_02999"
    with pytest.raises(IndexError):
        cases[3000]


def test_no_file_of_a_folder_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched(tmp_path, *(f"case_{i:05d}_0000{END}" for i in range(50)))
    asked: list[object] = []
    for function in ("stat", "lstat", "open"):
        original = getattr(os, function)
        monkeypatch.setattr(os, function, lambda path, *a, _f=original, **k: (asked.append(path), _f(path, *a, **k))[1])
    assert len(cases_from_input([tmp_path], END)) == 50
    assert not [path for path in asked if str(path).endswith(END)]


# --- DICOM -----------------------------------------------------------------------------------------------------------


def series(folder: Path, uid: str = "1.2.3") -> Path:
    return saved(folder, slices(stored_values(), series=uid))


def test_a_dicom_series_is_a_case_named_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = series(tmp_path / "pat 1.5")
    (folder / "notes.txt").touch()
    for path in (folder, folder / ".." / "pat 1.5"):
        (case,) = cases_from_input([path], END)
        assert (case.id, case.files, case.is_dicom) == ("pat 1.5", (path,), True)
        assert case.output_name(END) == "pat 1.5.nii.gz"
    monkeypatch.chdir(folder)
    (case,) = cases_from_input([Path()], END)
    assert case.id == "pat 1.5"
    assert read_series(case.files, ("CT",), "SimpleITKIO").data.shape == (1, 5, 6, 7)


def test_a_folder_of_series_holds_a_case_per_folder_and_loses_none(tmp_path: Path) -> None:
    for name in ("b", "P_0002", "P_0001", "a.x"):
        series(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "list.csv").touch()
    cases = cases_from_input([tmp_path], END)
    assert ids_and_names(cases) == {name: [name] for name in ("P_0001", "P_0002", "a.x", "b", "empty")}
    assert [case.id for case in cases] == sorted(case.id for case in cases)
    assert all(case.is_dicom for case in cases)
    with pytest.raises(InputError, match="no DICOM files"):
        read_series(next(case.files for case in cases if case.id == "empty"), ("CT",), "SimpleITKIO")


def test_folders_numbered_from_zero_are_channels(tmp_path: Path) -> None:
    for name in ("a_0001", "a_0000", "b_0000", "c_0000", "c_0002", "d_0001"):
        series(tmp_path / name)
    cases = cases_from_input([tmp_path], END)
    assert ids_and_names(cases) == {
        "a": ["a_0000", "a_0001"], "b": ["b_0000"], "c": ["c_0000", "c_0001"], "d_0001": ["d_0001"]
    }  # fmt: skip
    with pytest.raises(InputError) as error:
        read_series(cases[2].files, ("T1", "T2"), "SimpleITKIO")
    assert error.value.where == tmp_path / "c_0001"
    assert cases[2].is_dicom


def test_a_folder_that_gives_two_cases_one_name_is_refused(tmp_path: Path) -> None:
    series(tmp_path / "a")
    series(tmp_path / "a_0000")
    assert "Two cases are called a," in refusal(tmp_path).what


def test_images_of_the_model_come_before_dicom(tmp_path: Path) -> None:
    series(tmp_path / "sub")
    series(tmp_path)
    touched(tmp_path, f"x_0000{END}")
    assert ids_and_names(cases_from_input([tmp_path], END)) == {"x": [f"x_0000{END}"]}
    assert not cases_from_input([tmp_path], END)[0].is_dicom


def test_what_only_looks_like_dicom_is_none(tmp_path: Path) -> None:
    for name in ("slice.dcm", "1.2.3", "x"):
        (tmp_path / name).write_bytes(bytes(128) + b"DIC")
    error = refusal(tmp_path)
    assert "no image of the model's file ending" in error.what
    assert "DICOM series" in str(error.expected)


def test_a_folder_that_may_not_be_entered_does_not_keep_the_others_from_being_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    original = os.scandir

    def forbidden(path: object = ".") -> object:
        if str(path).endswith("bad"):
            raise PermissionError(13, "Permission denied")
        return original(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", forbidden)
    cases = cases_from_input([tmp_path], END)
    assert [case.id for case in cases] == ["bad", "good"]
    with pytest.raises(InputError, match="Permission denied"):
        read_series(cases[0].files, ("CT",), "SimpleITKIO")


def test_a_list_names_series_by_their_folders(tmp_path: Path) -> None:
    for name in ("one", "P_0012", "m_0000", "m_0001", "t1", "t2", "s_0000"):
        series(tmp_path / name)
    entries = [["one"], ["P_0012"], ["m_0000", "m_0001"], {"id": "x", "files": ["t2", "t1"]}, ["s_0000"], [f"f{END}"]]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    cases = cases_from_input([tmp_path / "list.json"], END)
    assert ids_and_names(cases) == {
        "one": ["one"], "P_0012": ["P_0012"], "m": ["m_0000", "m_0001"], "x": ["t2", "t1"], "s": ["s_0000"],
        "f": [f"f{END}"],
    }  # fmt: skip
    assert [case.is_dicom for case in cases] == [True] * 5 + [False]
    (tmp_path / "list.txt").write_text("one\nm_0000 m_0001\n")
    assert ids_and_names(cases_from_input([tmp_path / "list.txt"], END)) == {"one": ["one"], "m": ["m_0000", "m_0001"]}
    (tmp_path / "list.json").write_text('[["m_0001", "m_0000"]]')
    assert "not complete or not in order" in refusal(tmp_path / "list.json").what
    (tmp_path / "list.json").write_text('[["gone"]]')
    assert "not of the kind" in refusal(tmp_path / "list.json").what
