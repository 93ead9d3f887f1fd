"""Reading checkpoints: what nnU-Net writes is read, what would run code is not run, what is damaged is refused."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_models import make_checkpoint, make_dataset, make_plans, tiny_network

from trtbuild.errors import MissingExtra, ModelError, Untrusted
from trtbuild.source.checkpoint import Checkpoint, load_checkpoint

WEIGHTS = {"encoder.conv.weight": torch.arange(6.0).reshape(2, 3), "seg.bias": torch.tensor([0.5, -1.0])}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def read(path: Path, trust: bool = False) -> Checkpoint:
    return load_checkpoint(path, trust=trust)


class Call:
    """Pickles as a call: reading it without care calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


# --- what is read ---


def test_facts_and_weights_of_a_checkpoint_arrive(tmp_path: Path) -> None:
    checkpoint = read(saved(tmp_path / "c.pth", make_checkpoint(WEIGHTS, fold="all")))
    assert (checkpoint.configuration, checkpoint.trainer, checkpoint.fold) == ("3d_fullres", "nnUNetTrainer", "all")
    assert checkpoint.mirror_axes == (0, 1)
    assert checkpoint.weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(checkpoint.weights[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # nnU-Net, of one output scale
def test_a_checkpoint_written_by_nnunets_own_trainer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    preprocessed = tmp_path / "Dataset042_Tiny" / "nnUNetPlans_3d_fullres"
    preprocessed.mkdir(parents=True)
    (preprocessed / "case.b2nd").touch()  # the trainer asks for the format of its data
    plans = {**make_plans(), "continue_training": False}
    trainer = nnUNetTrainer(plans, "3d_fullres", 3, make_dataset(), torch.device("cpu"))
    trainer.initialize()
    trainer._best_ema = np.float64(0.5)
    trainer.inference_allowed_mirroring_axes = (0, 2)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    checkpoint = read(tmp_path / "c.pth")
    assert (checkpoint.configuration, checkpoint.trainer, checkpoint.fold) == ("3d_fullres", "nnUNetTrainer", "3")
    assert checkpoint.mirror_axes == (0, 2)
    expected = trainer.network.state_dict()
    assert all(torch.equal(checkpoint.weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("axes", [None, ..., ()])
def test_without_mirror_axes_nothing_is_mirrored(tmp_path: Path, axes: Any) -> None:
    content = make_checkpoint(WEIGHTS, inference_allowed_mirroring_axes=axes)
    assert read(saved(tmp_path / "c.pth", content)).mirror_axes == ()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_stripped(tmp_path: Path, prefix: str) -> None:
    content = make_checkpoint({prefix + key: value for key, value in WEIGHTS.items()})
    assert read(saved(tmp_path / "c.pth", content)).weights.keys() == WEIGHTS.keys()


def test_marks_of_compiled_submodules_inside_names_are_removed(tmp_path: Path) -> None:
    weights = {"encoder._orig_mod.conv.weight": torch.zeros(1), "decoder.my_orig_mod.bias": torch.zeros(1)}
    names = set(read(saved(tmp_path / "c.pth", make_checkpoint(weights))).weights)
    assert names == {"encoder.conv.weight", "decoder.my_orig_mod.bias"}


def test_weights_that_fall_together_without_the_marks_are_refused(tmp_path: Path) -> None:
    weights = {"a._orig_mod.b": torch.zeros(1), "a.b": torch.ones(1)}
    with pytest.raises(ModelError, match="same name"):
        read(saved(tmp_path / "c.pth", make_checkpoint(weights)))


def test_a_prefix_that_only_some_weights_have_is_part_of_their_name(tmp_path: Path) -> None:
    weights = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert read(saved(tmp_path / "c.pth", make_checkpoint(weights))).weights.keys() == weights.keys()


def test_the_format_before_torch_1_6_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pth", make_checkpoint(WEIGHTS), _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert torch.equal(read(path).weights["seg.bias"], WEIGHTS["seg.bias"])


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_scalars_of_numpy_1_and_2_are_read(tmp_path: Path, module: bytes) -> None:
    path = saved(tmp_path / "new.pth", make_checkpoint(WEIGHTS))
    other = tmp_path / "other.pth"
    _rewrite(path, other, lambda pickled: pickled.replace(b"numpy._core.multiarray", module))
    assert module in _pickled(other)
    assert read(other).trainer == "nnUNetTrainer"


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int64", "uint8", "bool", "complex128", "str"])
def test_numpy_scalars_of_every_kind_are_read(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "c.pth", make_checkpoint(WEIGHTS, _best_ema=np.dtype(kind).type(1)))
    assert read(path).trainer == "nnUNetTrainer"


# --- what would run code ---


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["logging", "network_weights", "trainer_name"])
def test_a_checkpoint_that_would_run_a_command_is_refused_and_runs_nothing(
    tmp_path: Path, where: str, zipped: bool
) -> None:
    import os

    target = tmp_path / "ran"
    content = make_checkpoint(WEIGHTS, **{where: Call(os.system, f"touch {target}")})
    path = saved(tmp_path / "c.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Untrusted) as caught:
        read(path)
    assert "--trust-checkpoint" in str(caught.value)
    assert f"{os.system.__module__}.system" in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("function", [eval, exec, __import__, open, getattr, pickle.loads, np.load, torch.load, Path])
def test_no_other_way_out_of_the_pickle_is_taken(tmp_path: Path, function: Any) -> None:
    argument = str(tmp_path / "ran") if function in (open, Path) else "0"
    path = saved(tmp_path / "c.pth", make_checkpoint(WEIGHTS, logging=Call(function, argument)))
    with pytest.raises(Untrusted) as caught:
        read(path)
    assert function.__name__ in str(caught.value)


def test_a_newer_pickle_protocol_is_refused_with_the_way_to_trust_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pth", make_checkpoint(WEIGHTS), pickle_protocol=4)
    with pytest.raises(Untrusted, match="--trust-checkpoint"):
        read(path)
    assert read(path, trust=True).configuration == "3d_fullres"


def test_a_trusted_checkpoint_may_run_code(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    content = make_checkpoint(WEIGHTS, logging=Call(Path.touch, target))
    assert read(saved(tmp_path / "c.pth", content), trust=True).weights.keys() == WEIGHTS.keys()
    assert target.exists()


def test_refusal_leaves_torchs_own_allow_list_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(Untrusted):
        read(saved(tmp_path / "c.pth", make_checkpoint(WEIGHTS, logging=Call(eval, "0"))))
    assert set(torch.serialization.get_safe_globals()) == before


# --- what is wrong ---


@pytest.mark.parametrize("size", [0, 1, 3, 100, 0.5, 0.9, -1])
@pytest.mark.parametrize("trust", [True, False])
def test_a_truncated_checkpoint_is_damaged_not_untrusted(tmp_path: Path, size: float, trust: bool) -> None:
    path = saved(tmp_path / "c.pth", make_checkpoint(tiny_network().state_dict()))
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content)) if 0 < size < 1 else int(size)])
    with pytest.raises(ModelError, match="damaged") as caught:
        read(path, trust)
    assert not isinstance(caught.value, Untrusted)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80\x02", b"\x00" * 1000, b"PK\x03\x04" + b"x" * 50, b"PK\x05\x06" + bytes(18)]
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        read(tmp_path / "c.pth")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_in_the_pickle_is_a_model_error_or_harmless(tmp_path: Path, position: float, value: int) -> None:
    path = saved(tmp_path / "c.pth", make_checkpoint(WEIGHTS))

    def changed(pickled: bytes) -> bytes:
        at = int(position * len(pickled))
        return pickled[:at] + bytes([value]) + pickled[at + 1 :]

    _rewrite(path, tmp_path / "changed.pth", changed)
    try:
        checkpoint = read(tmp_path / "changed.pth")
    except ModelError:
        return
    assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.weights.values())


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"network_weights": ...}, "network_weights"),
    ({"network_weights": {}}, "network_weights"),
    ({"network_weights": [torch.zeros(1)]}, "network_weights"),
    ({"network_weights": {"a": 1.0}}, "network_weights"),
    ({"network_weights": {1: torch.zeros(1)}}, "network_weights"),
    ({"network_weights": {"a": torch.zeros(2, 2).to_sparse()}}, "network_weights"),
    ({"network_weights": {"a": torch.zeros(2, device="meta")}}, "network_weights"),
    ({"network_weights": {"a": torch.tensor([1.0, float("nan")])}}, "NaN or infinite"),
    ({"network_weights": {"a": torch.tensor([1.0, float("-inf")])}}, "NaN or infinite"),
    ({"trainer_name": ...}, "trainer_name"),
    ({"trainer_name": 3}, "trainer_name"),
    ({"init_args": ...}, "init_args"),
    ({"init_args": {"fold": 0}}, "configuration"),
    ({"init_args": {"configuration": ["3d_fullres"]}}, "configuration"),
    ({"inference_allowed_mirroring_axes": 1}, "inference_allowed_mirroring_axes"),
    ({"inference_allowed_mirroring_axes": (0, 3)}, "inference_allowed_mirroring_axes"),
    ({"inference_allowed_mirroring_axes": (-1,)}, "inference_allowed_mirroring_axes"),
    ({"inference_allowed_mirroring_axes": (0, 0)}, "inference_allowed_mirroring_axes"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), FAULTS)
def test_a_fault_in_the_checkpoint_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    content = {key: value for key, value in (make_checkpoint(WEIGHTS) | changes).items() if value is not ...}
    with pytest.raises(ModelError, match=named):
        read(saved(tmp_path / "c.pth", content))


def test_a_file_with_something_else_than_a_dict_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no checkpoint of nnU-Net"):
        read(saved(tmp_path / "c.pth", [torch.zeros(1)]))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"c\.pth"):
        read(tmp_path / "c.pth")


def test_without_torch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "c.pth", make_checkpoint(WEIGHTS))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trtbuild\[export\]'"):
        read(path)


def _pickled(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _rewrite(path: Path, target: Path, change: Callable[[bytes], bytes]) -> None:
    """Copies a checkpoint with its pickle changed; records stay uncompressed, as torch needs them."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
        for name in archive.namelist():
            content = archive.read(name)
            copy.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("trust", [False, True])
def test_a_checkpoint_with_packed_tensors_is_refused_before_they_unpack(tmp_path: Path, trust: bool) -> None:
    plain, packed = saved(tmp_path / "plain.pth", make_checkpoint(WEIGHTS)), tmp_path / "packed.pth"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert read(plain, trust).trainer == "nnUNetTrainer"
    with pytest.raises(ModelError, match="packed in a way"):
        read(packed, trust)


def test_a_checkpoint_whose_members_overlap_is_refused(tmp_path: Path) -> None:
    """Many entries of the directory that point to the same bytes: as large as one likes in a small file."""
    plain = saved(tmp_path / "plain.pth", make_checkpoint({"a": torch.zeros(100_000), "seg.bias": torch.zeros(2)}))
    content = plain.read_bytes()
    with zipfile.ZipFile(plain) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        start = archive.start_dir
    directory, end = content[start : content.rindex(b"PK\x05\x06")], content[content.rindex(b"PK\x05\x06") :]
    entry = directory[directory.index(largest.filename.encode()) - 46 :]
    entry = entry[: 46 + len(largest.filename) + int.from_bytes(entry[30:32], "little")]
    many = directory + entry * 50
    count = int.from_bytes(end[8:10], "little") + 50
    tail = end[:8] + count.to_bytes(2, "little") * 2 + len(many).to_bytes(4, "little") + end[16:]
    (tmp_path / "many.pth").write_bytes(content[:start] + many + tail)
    with pytest.raises(ModelError):
        read(tmp_path / "many.pth")
