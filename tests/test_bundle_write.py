"""A bundle is under its name whole or not at all, and nothing that is there is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_samples import CONTENTS, FILES, SPEC, STAGE, hidden, read_json, write_sample

from trtbuild import errors
from trtbuild.bundle import Provenance, open_bundle, swap, verify_bundle, write_bundle, writer
from trtbuild.spec import KeepLargestComponent

NEW: dict[str, Any] = {"gates": ({"new": True},)}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder."""
    if request.param == "two renames":
        monkeypatch.setattr(swap, "exchange", lambda first, second: False)
    return str(request.param)


# ---- what it writes


def keep(*labels: int, background: int = 0) -> KeepLargestComponent:
    return KeepLargestComponent(labels=labels, background=background)


def test_postprocessing_and_notes_come_back_as_they_were(tmp_path: Path) -> None:
    steps, notes = (keep(1), keep(0, background=1)), ("fold_all is used", "Ünïcode")
    provenance = replace(CONTENTS.provenance, notes=notes)
    bundle = write_sample(tmp_path, postprocessing=steps, provenance=provenance)
    assert open_bundle(bundle.path).manifest.postprocessing == steps
    assert open_bundle(bundle.path).manifest.provenance.notes == notes


def test_the_same_contents_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_sample(tmp_path, "a.trtb"), write_sample(tmp_path, "b.trtb")
    assert tree(first.path) == tree(second.path)
    assert first.identity == second.identity
    assert hidden(tmp_path) == []


def test_bundle_json_is_readable_utf8_with_sorted_files(tmp_path: Path) -> None:
    text = (write_sample(tmp_path).path / "bundle.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "format": 1,\n  "stages": [\n')
    assert text.endswith("}\n")
    assert "Ünïcode" in text
    assert list(json.loads(text)["files"]) == sorted(FILES)


def test_files_come_from_paths_as_well_as_from_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(3_000_000))
    (tmp_path / "link").symlink_to(source)
    files = {**FILES, "big.bin": source, "linked.bin": tmp_path / "link"}
    bundle = write_bundle(tmp_path / "a.trtb", CONTENTS, files, overwrite=False)
    assert bundle.file("big.bin").read_bytes() == source.read_bytes() == bundle.file("linked.bin").read_bytes()
    assert not bundle.file("linked.bin").is_symlink()


def test_an_engine_is_added_by_writing_the_bundle_again(tmp_path: Path) -> None:
    old = write_sample(tmp_path)
    engine = replace(CONTENTS.engines[0], file="engines/more.engine", version="2")
    contents = replace(old.manifest.contents, engines=(*CONTENTS.engines, engine))
    files = {**{name: old.file(name) for name in old.manifest.files}, "engines/more.engine": b"more"}
    new = write_bundle(old.path, contents, files, overwrite=True)
    assert new.manifest.engines[-1] == engine
    assert new.identity != old.identity
    assert len(verify_bundle(new)) == len(FILES) + 1
    with pytest.raises(errors.BundleHash, match="open the bundle again"):
        verify_bundle(old)


def test_permissions_follow_the_umask_and_not_the_private_temporary(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        bundle = write_sample(tmp_path)
    finally:
        os.umask(old)
    assert bundle.path.stat().st_mode & 0o777 == 0o755
    assert bundle.file("plans.json").stat().st_mode & 0o777 == 0o644


# ---- what it refuses, leaving nothing


@pytest.mark.parametrize("name", ["brain", "brain.trtb.zip", "brain.TRTB", ".trtb"])
def test_the_name_must_end_in_trtb(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.OutputError, match=r"\.trtb"):
        write_sample(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_an_error_without_overwrite(tmp_path: Path) -> None:
    before = tree(write_sample(tmp_path).path)
    with pytest.raises(errors.OutputError, match="--overwrite"):
        write_sample(tmp_path, **NEW)
    assert tree(tmp_path / "sample.trtb") == before
    assert hidden(tmp_path) == []


def test_overwrite_replaces_the_whole_folder(tmp_path: Path, way: str) -> None:
    old = write_sample(tmp_path)
    files = {name: content for name, content in FILES.items() if name != "empty.txt"}
    new = write_bundle(old.path, replace(CONTENTS, **NEW), files, overwrite=True)
    assert new.path == old.path
    assert open_bundle(old.path).manifest.gates == ({"new": True},)
    assert not (old.path / "empty.txt").exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_overwrite_does_not_touch_what_is_no_bundle(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "sample.trtb"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(errors.OutputError):
        write_sample(tmp_path, overwrite=overwrite)
    assert tree(target) == {"thesis.txt": b"years of work"}
    shutil.rmtree(target)
    target.write_text("a file")
    with pytest.raises(errors.OutputError):
        write_sample(tmp_path, overwrite=overwrite)
    assert target.read_text() == "a file"
    target.unlink()
    (tmp_path / "real").mkdir()
    target.symlink_to(tmp_path / "real")
    with pytest.raises(errors.OutputError):
        write_sample(tmp_path, overwrite=overwrite)
    assert target.is_symlink()
    assert hidden(tmp_path) == []


def test_overwrite_takes_a_damaged_bundle_and_an_empty_folder(tmp_path: Path, way: str) -> None:
    damaged = write_sample(tmp_path).path
    (damaged / "bundle.json").write_text("{")
    assert verify_bundle(write_sample(tmp_path, overwrite=True))
    (tmp_path / "empty.trtb").mkdir()
    assert verify_bundle(write_sample(tmp_path, "empty.trtb", overwrite=True))
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "more", "kind", "words"),
    [
        ({"stages": ()}, {}, errors.BundleKey, "stages"),
        ({"stages": (replace(STAGE, mirror_axes=(2,)),)}, {}, errors.BundleKey, "mirror_axes"),
        ({"goldens": (replace(CONTENTS.goldens[0], input="none.npy"),)}, {}, errors.BundleKey, "goldens[0].input"),
        ({"extensions": {"x": float("nan")}}, {}, errors.BundleKey, "JSON"),
        ({"extensions": {"x": np.int64(3)}}, {}, errors.BundleKey, "JSON"),
        ({"extensions": {"x": "\ud800"}}, {}, errors.BundleKey, "JSON"),
        ({"stages": (replace(STAGE, spec=replace(SPEC, dataset=None)),)}, {}, errors.BundleKey, "spec.dataset"),
        ({"format": 2}, {}, errors.BundleFormat, "format"),
        ({"postprocessing": (keep(),)}, {}, errors.BundleKey, "postprocessing[0].labels"),
        ({"postprocessing": (keep(1), keep(1, 1))}, {}, errors.BundleKey, "postprocessing[1].labels"),
        ({"postprocessing": (keep(2),)}, {}, errors.BundleKey, "postprocessing[0].labels"),
        ({"postprocessing": (keep(1, background=1),)}, {}, errors.BundleKey, "postprocessing[0].background"),
        ({"postprocessing": (keep(1, background=9),)}, {}, errors.BundleKey, "postprocessing[0].background"),
        ({}, {"../escape": b""}, errors.BundlePath, "../escape"),
        ({}, {"/tmp/escape": b""}, errors.BundlePath, "/tmp/escape"),
        ({}, {"bundle.json": b"{}"}, errors.BundlePath, "itself"),
        ({}, {"PLANS.json": b"{}"}, errors.BundlePath, "case"),
        ({}, {"plans.json/more": b"{}"}, errors.OutputError, "plans.json"),
        ({}, {"x": Path("/nonexistent/x")}, errors.OutputError, "/nonexistent/x"),
        ({}, {"x": Path("/")}, errors.OutputError, "directory"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_never_written(
    tmp_path: Path, changes: Any, more: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as caught:
        write_bundle(tmp_path / "a.trtb", replace(CONTENTS, **changes), {**FILES, **more}, overwrite=False)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_missing_or_a_file_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(errors.OutputError, match="make the folder"):
        write_sample(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputError):
        write_sample(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(errors.OutputError, match="may write to"):
            write_sample(tmp_path)
    finally:
        tmp_path.chmod(0o700)


# ---- failures in the middle


class Failing:
    """`call`, but call number `at` raises `error`."""

    def __init__(self, call: Callable[..., Any], at: int, error: BaseException) -> None:
        self.call, self.at, self.error, self.calls = call, at, error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at + 1:
            raise self.error
        return self.call(*args, **kwargs)


@pytest.mark.parametrize("name", ["fsync", "mkdir", "rename", "open"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied"),
     KeyboardInterrupt()],
)  # fmt: skip
def test_a_failure_or_ctrl_c_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, way: str, name: str, error: BaseException
) -> None:
    """Call number n of os.<name> fails, for every n until there is no such call."""
    write_sample(tmp_path)
    for at in range(200):
        raised: BaseException | None = None
        call = Failing(getattr(os, name), at, error)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, call)
            try:
                write_sample(tmp_path, overwrite=True, gates=({"at": at},))
            except (errors.TrtbuildError, KeyboardInterrupt) as caught:
                raised = caught
        opened = open_bundle(tmp_path / "sample.trtb")
        assert verify_bundle(opened)
        if raised is None:
            assert opened.manifest.gates == ({"at": at},)
        elif isinstance(error, OSError):
            assert isinstance(raised, errors.OutputError)
            assert raised.hint
        if call.calls <= at:
            assert raised is None
            break
    assert at >= 2 or (way, name) == ("exchange", "rename")
    write_sample(tmp_path, overwrite=True)
    assert hidden(tmp_path) == []


def test_a_failed_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        monkeypatch.setattr(os, "fsync", Failing(os.fsync, 5, error))
        with pytest.raises((errors.OutputError, KeyboardInterrupt)) as caught:
            write_sample(tmp_path)
        monkeypatch.undo()
        if isinstance(caught.value, errors.OutputError):
            assert "free some space" in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: the write itself fails, as it does there."""
    code = (
        "import resource, sys; from pathlib import Path; from bundle_samples import *; from trtbuild.errors import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_bundle(Path(sys.argv[1]) / 'a.trtb', CONTENTS, FILES | {'big': bytes(10**6)}, overwrite=False)\n"
        "except OutputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert "cannot be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


# ---- other writers, living and dead


def test_two_writers_of_one_bundle_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    fill = writer._fill

    def slow(*args: Any) -> Any:
        inside.set()
        assert go_on.wait(20)
        return fill(*args)

    monkeypatch.setattr(writer, "_fill", slow)
    first = threading.Thread(target=write_sample, args=(tmp_path,))
    first.start()
    assert inside.wait(20)
    monkeypatch.setattr(writer, "_fill", fill)
    with pytest.raises(errors.OutputError, match="Another process"):
        write_sample(tmp_path)
    assert write_sample(tmp_path, "other.trtb")  # another name is another lock
    go_on.set()
    first.join()
    assert verify_bundle(open_bundle(tmp_path / "sample.trtb"))
    assert hidden(tmp_path) == []


def test_a_lock_whose_file_its_last_holder_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    flock, calls = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".a.trtb.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with swap.writing_lock(tmp_path / "a.trtb"):
        assert (tmp_path / ".a.trtb.lock").exists()
        with pytest.raises(BlockingIOError), swap.writing_lock(tmp_path / "a.trtb"):
            pass
    assert hidden(tmp_path) == []


def staging_of_a_dead_writer(tmp_path: Path, part: str, name: str = "sample.trtb") -> Path:
    """What a killed writer leaves: a staging folder with a bundle in it as `part`."""
    folder = tmp_path / f".{name}.abc_1234.tmp"
    write_sample(tmp_path, "made.trtb", **NEW).path.rename(folder.with_name("made"))
    folder.mkdir()
    (tmp_path / "made").rename(folder / part)
    return folder


def test_the_next_writer_removes_what_a_dead_one_left_and_nothing_else(tmp_path: Path) -> None:
    dead = staging_of_a_dead_writer(tmp_path, "new")
    half = tmp_path / ".sample.trtb.00000000.tmp"
    (half / "trash").mkdir(parents=True)
    foreign = [".sample.trtb.tmp", ".sample.trtb.abc.tmp", ".other.trtb.abc_1234.tmp", "sample.trtb.abc_1234.tmp",
               ".sample.trtb.ABCDEFGH.tmp"]  # fmt: skip
    for name in foreign:
        (tmp_path / name / "new").mkdir(parents=True)
    mine = tmp_path / ".sample.trtb.mine1234.tmp"
    (mine / "letters").mkdir(parents=True)
    (tmp_path / ".sample.trtb.file1234.tmp").write_text("a file")
    (tmp_path / "kept").mkdir()
    (tmp_path / ".sample.trtb.link1234.tmp").symlink_to(tmp_path / "kept")
    write_sample(tmp_path)
    assert not dead.exists()
    assert not half.exists()
    assert all((tmp_path / name / "new").is_dir() for name in foreign)
    assert (mine / "letters").is_dir()
    assert (tmp_path / ".sample.trtb.file1234.tmp").exists()
    assert (tmp_path / ".sample.trtb.link1234.tmp").is_symlink()
    assert (tmp_path / "kept").is_dir()


def test_a_replacement_that_was_cut_short_is_undone_by_the_next_open(tmp_path: Path) -> None:
    staging_of_a_dead_writer(tmp_path, "old")
    opened = open_bundle(tmp_path / "sample.trtb")
    assert opened.manifest.gates == ({"new": True},)
    assert verify_bundle(opened)
    write_sample(tmp_path, overwrite=True)
    assert hidden(tmp_path) == []


def test_a_replacement_that_was_cut_short_is_undone_by_the_next_write(tmp_path: Path) -> None:
    staging_of_a_dead_writer(tmp_path, "old")
    with pytest.raises(errors.OutputError, match="exists already"):
        write_sample(tmp_path)
    assert open_bundle(tmp_path / "sample.trtb").manifest.gates == ({"new": True},)
    assert hidden(tmp_path) == []


def test_a_bundle_that_is_being_replaced_is_left_to_its_writer(tmp_path: Path) -> None:
    folder = staging_of_a_dead_writer(tmp_path, "old")
    with swap.writing_lock(tmp_path / "sample.trtb") as alone:
        assert alone
        with pytest.raises(errors.BundleMissing, match="try again"):
            open_bundle(tmp_path / "sample.trtb")
        assert (folder / "old").is_dir()
    assert open_bundle(tmp_path / "sample.trtb")


def test_without_file_locks_nothing_is_cleared_and_the_way_back_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    folder = staging_of_a_dead_writer(tmp_path, "old")
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(errors.BundleMissing) as caught:
        open_bundle(tmp_path / "sample.trtb")
    assert caught.value.hint == f"mv '{folder / 'old'}' '{tmp_path / 'sample.trtb'}'"
    assert verify_bundle(write_sample(tmp_path))
    assert (folder / "old").is_dir()
    assert hidden(tmp_path) == [folder.name]


def test_exchange_swaps_two_folders_here(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    if not swap.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system cannot exchange folders; two renames are tested above")
    assert (tmp_path / "b" / "x").exists()
    with pytest.raises(FileNotFoundError):
        swap.exchange(tmp_path / "a", tmp_path / "none")


def test_provenance_may_name_a_folder_in_any_script(tmp_path: Path) -> None:
    provenance = replace(CONTENTS.provenance, model="モデル – ä")
    assert isinstance(provenance, Provenance)
    assert read_json(write_sample(tmp_path, provenance=provenance).path)["provenance"]["model"] == "モデル – ä"
