"""Which files belong to which case: folders as nnU-Net reads them, image files, case lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from trtbuild.errors import InputError
from trtbuild.volume.cases import Case, cases_from_input
from trtbuild.volume.io import reader_named

END = ".nii.gz"


def touched(folder: Path, *names: str) -> list[Path]:
    """Empty files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def ids_and_names(cases: tuple[Case, ...]) -> dict[str, list[str]]:
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
