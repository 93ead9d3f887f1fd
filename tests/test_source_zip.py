"""Models in a zip: read in place like a folder, one of several by name, and nothing that no honest zip would hold."""

from __future__ import annotations

import io
import json
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from source_models import MODEL, make_plans, replaced, write_model

from trtbuild.errors import ModelError
from trtbuild.source import ExportedModel, ModelName, SourceConfig, export_model, zipped

DATASET = "Dataset042_Tiny"


def export(path: Path, **config: Any) -> ExportedModel:
    name = ModelName(
        **{key: config.pop(key) for key in ("dataset", "configuration", "trainer", "plans") if key in config}
    )
    return export_model(SourceConfig(folder=path, name=name, **config))


def zipped_folder(folder: Path, target: Path, *, below: str = "") -> Path:
    """A deflated zip of a folder, its files under `below`."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, below + path.relative_to(folder).as_posix())
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), folds=(0, 1, "all"))


def test_a_zip_of_nnunets_own_exporter_gives_what_the_folder_gives(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2.model_sharing import model_export
    from nnunetv2.utilities import file_path_utilities

    folder = tmp_path / "results" / DATASET / MODEL
    folder.parent.mkdir(parents=True)
    folder.symlink_to(model, target_is_directory=True)
    for fold in (0, 1):
        (model / f"fold_{fold}" / "progress.png").touch()
        (model / f"fold_{fold}" / "validation").mkdir(exist_ok=True)
        (model / f"fold_{fold}" / "validation" / "summary.json").write_text("{}")
    (model / "dataset_fingerprint.json").write_text("{}")
    for module in (model_export, file_path_utilities):
        monkeypatch.setattr(module, "nnUNet_results", str(tmp_path / "results"), raising=False)
    monkeypatch.setattr(model_export, "maybe_convert_to_dataset_name", lambda name: name)
    monkeypatch.setattr(file_path_utilities, "maybe_convert_to_dataset_name", lambda name: name)
    archive = tmp_path / "exported.zip"
    model_export.export_pretrained_model(DATASET, str(archive), configurations=("3d_fullres",), folds=(0, 1))

    inside, outside = export(archive), export(model)
    assert inside.spec == outside.spec
    assert inside.sources == outside.sources
    assert (inside.plans, inside.dataset) == (outside.plans, outside.dataset)
    assert inside.where == archive / DATASET / MODEL
    assert [n.model for n in inside.networks] == [n.model for n in outside.networks]
    assert sorted(tmp_path.iterdir()) == sorted([archive, tmp_path / "results"])  # nothing was unpacked


@pytest.mark.parametrize("below", ["", f"{MODEL}/", f"{DATASET}/{MODEL}/", f"a/b/{DATASET}/{MODEL}/"])
def test_the_model_is_found_at_any_depth(tmp_path: Path, model: Path, below: str) -> None:
    found = export(zipped_folder(model, tmp_path / "m.zip", below=below), folds=("1",))
    assert list(found.networks.checkpoints) == ["1"]
    assert found.where == tmp_path / "m.zip" / below


def test_weights_of_a_zip_are_not_kept_and_are_read_again(tmp_path: Path, model: Path) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip")
    found = export(archive, folds=("0",))
    assert not found.networks.checkpoints["0"].weights
    assert len(list(found.networks)) == len(list(found.networks)) == 1
    other = write_model(tmp_path / "other", network=None, trainer_name="nnUNetTrainerAdam")
    zipped_folder(other, archive)
    with pytest.raises(ModelError, match=r"changed while it was read|damaged"):
        list(found.networks)


def two_models(tmp_path: Path) -> Path:
    archive = tmp_path / "two.zip"
    for configuration in ("3d_fullres", "3d_lowres"):
        folder = write_model(tmp_path / configuration)
        plans = replaced(make_plans(), ("configurations", "3d_lowres"), make_plans()["configurations"]["3d_fullres"])
        (folder / "plans.json").write_text(json.dumps(plans))
        checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
        checkpoint["init_args"]["configuration"] = configuration
        torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as target:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                target.write(path, f"{DATASET}/nnUNetTrainer__nnUNetPlans__{configuration}/{path.relative_to(folder)}")
    return archive


def test_one_of_several_models_is_chosen_by_its_names(tmp_path: Path) -> None:
    archive = two_models(tmp_path)
    for configuration in ("3d_fullres", "3d_lowres"):
        found = export(archive, configuration=configuration, dataset="42", trainer="nnUNetTrainer", plans="nnUNetPlans")
        assert found.spec.configuration == configuration
    for name in ({}, {"dataset": "42"}, {"trainer": "nnUNetTrainer"}):
        with pytest.raises(ModelError, match="several models") as caught:
            export(archive, **name)
        assert "3d_fullres" in str(caught.value)
        assert "3d_lowres" in str(caught.value)
    for name in ({"configuration": "2d"}, {"dataset": "43"}, {"plans": "Other"}, {"trainer": "Other"}):
        with pytest.raises(ModelError, match="the one that was named"):
            export(archive, **name)


def test_predictions_that_carry_plans_are_not_taken_for_models(tmp_path: Path, model: Path) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip", below=f"{DATASET}/{MODEL}/")
    with zipfile.ZipFile(archive, "a") as target:
        for name in ("plans.json", "dataset.json", "summary.json"):
            target.writestr(f"{DATASET}/{MODEL}/crossval_results_folds_0_1/{name}", "{}")
    assert export(archive, folds=("0",)).spec.dataset == DATASET


# --- hostile zips ---


def with_member(archive: Path, name: str, content: bytes = b"x", **attributes: Any) -> None:
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    for key, value in attributes.items():
        setattr(info, key, value)
    with zipfile.ZipFile(archive, "a") as target:
        target.writestr(info, content)


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "a/../../evil",
        "/etc/passwd",
        "C:/evil",
        "a\\..\\evil",
        "a//b",
        "./a",
        "a/./b",
        "a/..",
        "..",
        "a\0b/../c",
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, model: Path, name: str) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip")
    with_member(archive, "x" * len(name))
    raw = archive.read_bytes()
    archive.write_bytes(raw.replace(b"x" * len(name), name.encode()))  # as no library would write it
    with pytest.raises(ModelError, match=r"leaves its folder|absolute path"):
        export(archive)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_are_refused(tmp_path: Path, model: Path, kind: int) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip")
    with_member(archive, "fold_0/link", b"/etc/passwd", external_attr=(kind | 0o777) << 16)
    with pytest.raises(ModelError, match="link or a device"):
        export(archive)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(tmp_path: Path, model: Path) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip")
    with_member(archive, "plans.json", b"{}")
    with pytest.raises(ModelError, match="same name"):
        export(archive)


def test_an_encrypted_file_is_refused(tmp_path: Path, model: Path) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip")
    with_member(archive, "secret")
    raw = bytearray(archive.read_bytes())
    entry = raw.rindex(b"PK\x01\x02")
    raw[entry + 8] |= 1
    archive.write_bytes(raw)
    with pytest.raises(ModelError, match="encrypted"):
        export(archive)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, model: Path) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip")
    for name, size in (("plans.json", 4 << 20), ("fold_0/checkpoint_best.pth", 300 << 20)):
        bomb = tmp_path / "bomb.zip"
        bomb.write_bytes(archive.read_bytes())
        with zipfile.ZipFile(archive) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
            for info in source.infolist():
                if info.filename != name:
                    target.writestr(info.filename, source.read(info))
            with target.open(name, "w") as stream:
                for _ in range(size >> 20):
                    stream.write(bytes(1 << 20))
        with pytest.raises(ModelError, match="far more than a real one"):
            export(bomb, folds=("0",), checkpoint="checkpoint_best.pth")


def test_a_json_file_larger_than_any_real_one_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip")
    monkeypatch.setattr(zipped, "MAX_JSON", 1000)
    with pytest.raises(ModelError, match="larger than any real one"):
        export(archive)


def test_a_zip_with_a_list_without_end_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip")
    monkeypatch.setattr(zipped, "MAX_MEMBERS", 3)
    with pytest.raises(ModelError, match="more files than any model"):
        export(archive)


def lying_size(raw: bytearray) -> None:
    """The list says that plans.json is ten bytes long."""
    entry = next(i for i in found(raw, b"PK\x01\x02") if raw[i + 46 :].startswith(b"plans.json"))
    struct.pack_into("<I", raw, entry + 24, 10)


def flipped_byte(raw: bytearray) -> None:
    entry = next(i for i in found(raw, b"PK\x03\x04") if raw[i + 30 :].startswith(b"plans.json"))
    raw[entry + 30 + 10 + 40] ^= 0xFF


def found(raw: bytearray, magic: bytes) -> list[int]:
    places, start = [], 0
    while (place := raw.find(magic, start)) >= 0:
        places.append(place)
        start = place + 1
    return places


@pytest.mark.parametrize("damage", [lying_size, flipped_byte])
def test_a_damaged_or_lying_member_is_refused(tmp_path: Path, model: Path, damage: Callable[[bytearray], None]) -> None:
    raw = bytearray(zipped_folder(model, tmp_path / "m.zip").read_bytes())
    damage(raw)
    (tmp_path / "m.zip").write_bytes(raw)
    with pytest.raises(ModelError, match="damaged"):
        export(tmp_path / "m.zip")


def test_no_prefix_of_a_zip_passes_or_ends_in_another_error(tmp_path: Path, model: Path) -> None:
    raw = zipped_folder(model, tmp_path / "m.zip").read_bytes()
    for length in range(0, len(raw), max(1, len(raw) // 60)):
        (tmp_path / "cut.zip").write_bytes(raw[:length])
        with pytest.raises(ModelError):
            export(tmp_path / "cut.zip")


def test_flipped_bytes_end_in_an_answer_for_the_user(tmp_path: Path, model: Path) -> None:
    raw = zipped_folder(model, tmp_path / "m.zip").read_bytes()
    sound, rng = export(tmp_path / "m.zip").sources, random.Random(20)
    lists = raw.index(b"PK\x01\x02")
    refused = 0
    for number in range(120):
        place = rng.randrange(lists, len(raw)) if number % 2 else rng.randrange(len(raw))
        changed = bytearray(raw)
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / "m.zip").write_bytes(changed)
        try:
            read = export(tmp_path / "m.zip").sources
        except ModelError:
            refused += 1
        else:
            assert read.items() <= sound.items()  # a fold whose name changed may be missing, nothing may be different
    assert refused > 20


def test_other_compression_is_refused(tmp_path: Path, model: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_BZIP2) as archive:
        for path in sorted(p for p in model.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(model))
    with pytest.raises(ModelError, match="method 12"):
        export(tmp_path / "m.zip")


def test_a_zip_without_a_model_and_a_file_that_is_no_zip_say_so(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "m.zip").write_bytes(buffer.getvalue())
    with pytest.raises(ModelError, match="no trained nnU-Net v2 model") as caught:
        export(tmp_path / "m.zip")
    assert "readme.txt" in str(caught.value)
    (tmp_path / "model.pth").write_bytes(b"no zip")
    with pytest.raises(ModelError, match="no zip, or a damaged one"):
        export(tmp_path / "model.pth")


def test_missing_folds_and_checkpoints_of_a_zip_are_answered_with_what_there_is(tmp_path: Path, model: Path) -> None:
    archive = zipped_folder(model, tmp_path / "m.zip", below=f"{DATASET}/{MODEL}/")
    with pytest.raises(ModelError, match="no fold 4") as caught:
        export(archive, folds=("4",))
    assert "fold_0/checkpoint_final.pth" in str(caught.value)
    with pytest.raises(ModelError, match=r"checkpoint_best\.pth"):
        export(archive, checkpoint="checkpoint_best.pth")
