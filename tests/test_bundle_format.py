"""FORMAT.md says what the code does: every key of every class, every error, every limit, and an example that opens."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import trtbuild.bundle
from trtbuild import errors, spec
from trtbuild.bundle import FORMAT, FileEntry, Golden, Manifest, Provenance, Stage, checks, files, strictjson
from trtbuild.bundle.decode import manifest_from_text, text_from_manifest
from trtbuild.spec import json_from_value

TEXT = (Path(trtbuild.bundle.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
CLASSES: list[Any] = [
    Manifest, Stage, Golden, Provenance, FileEntry,
    *(value for value in vars(spec).values() if dataclasses.is_dataclass(value)),
]  # fmt: skip


def rows(heading: str) -> list[str]:
    """First cells of the table below the heading that begins with `heading`."""
    found = re.search(rf"^### {heading}\b.*?\n(.*?)(?=^#|\Z)", TEXT, re.S | re.M)
    assert found, heading
    return re.findall(r"^\| `(\w+)` \|", found[1], re.M)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_table_of_a_class_has_exactly_its_keys(kind: Any) -> None:
    assert sorted(rows(kind.__name__)) == sorted(field.name for field in dataclasses.fields(kind))


def test_no_table_is_of_a_class_that_is_gone() -> None:
    assert sorted(re.findall(r"^### (\w+)", TEXT, re.M)) == sorted(kind.__name__ for kind in CLASSES)


def test_every_refusal_is_in_the_table_of_errors() -> None:
    kinds = {kind.__name__ for kind in errors.BundleError.__subclasses__()}
    assert set(re.findall(r"\| `(Bundle\w+)` \|$", TEXT, re.M)) == kinds


def test_the_limits_are_those_of_the_code() -> None:
    assert f"Bundle format {FORMAT}" in TEXT
    assert f"at most {files.MAX_NAME} characters" in TEXT
    assert f"more than {strictjson.MAX_JSON_SIZE >> 20} MiB" in TEXT
    assert f"more than {strictjson.MAX_DEPTH} levels" in TEXT
    assert f"more than {strictjson.MAX_VALUES} values" in TEXT
    assert f"at most {checks.MAX_FILES}" in TEXT
    assert f"0 to {checks.MAX_FILE_SIZE >> 30} GiB" in TEXT
    assert f"1 to {checks.MAX_BATCH}" in TEXT
    assert checks.MAX_ELEMENTS == 2**31 - 1
    assert "at most 2³¹ − 1" in TEXT


def test_the_example_is_a_manifest_and_is_written_back_as_it_is() -> None:
    example = re.findall(r"^```json\n(.*?)^```", TEXT, re.S | re.M)[-1].encode()
    manifest = manifest_from_text(example)
    assert json_from_value(manifest) == json.loads(example)
    assert manifest_from_text(text_from_manifest(manifest)) == manifest
