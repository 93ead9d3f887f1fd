"""A writer that is killed leaves the old bundle, the new one, or none: never half a one, and nothing in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bundle_killed import FEW, FEW_FILES
from bundle_samples import FILES, hidden, write_sample

from trtbuild.bundle import open_bundle, swap, verify_bundle, write_bundle
from trtbuild.errors import BundleMissing

HERE = Path(__file__).parent
WRITE_FOREVER = """
import sys
from pathlib import Path
from bundle_killed import FEW, FEW_FILES
from bundle_samples import *
from trtbuild.bundle import write_bundle
for n in range(10**6):
    files = FILES | {"big.bin": bytes([n % 256]) * 3_000_000}
    contents = replace(CONTENTS, gates=({"n": n},))
    write_bundle(Path(sys.argv[1]) / "sample.trtb", contents, files, overwrite=True)
    print(n, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor SIGKILL")
@pytest.mark.parametrize("way", ["fresh", "exchange", "renames"])
def test_killed_at_any_line_the_old_or_the_new_is_there(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    subprocess.run([sys.executable, "bundle_killed.py", str(tmp_path), way], cwd=HERE, check=True)
    folders = sorted((path for path in tmp_path.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    assert len(folders) > 100
    states = [state_after_death(folder) for folder in folders]
    if way == "fresh":
        assert states == sorted(states, key=["none", "new"].index)
    else:
        assert states == sorted(states, key=["old", "new"].index)
    assert states[-1] == "new"
    assert len(set(states)) == 2


def state_after_death(folder: Path) -> str:
    """What a reader finds; then that the next writer succeeds and leaves nothing behind."""
    for old in folder.glob(".*.tmp/old"):
        assert verify_bundle(open_bundle(old))  # it may be put back, at any later time
    try:
        bundle = open_bundle(folder / "sample.trtb")
    except BundleMissing:
        state = "none"
    else:
        assert len(verify_bundle(bundle)) == 2
        state = "new" if bundle.manifest.gates else "old"
    write_bundle(folder / "sample.trtb", replace(FEW, gates=({"n": 2},)), FEW_FILES, overwrite=True)
    assert open_bundle(folder / "sample.trtb").manifest.gates == ({"n": 2},)
    assert hidden(folder) == []
    return state


def start_writer(folder: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(folder)], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "0\n"
    return writer


def test_killed_at_odd_moments_a_whole_bundle_is_there(tmp_path: Path) -> None:
    for round in range(4):
        writer = start_writer(tmp_path)
        time.sleep(0.01 + 0.013 * round)
        writer.kill()
        writer.communicate()
        bundle = open_bundle(tmp_path / "sample.trtb")
        assert len(verify_bundle(bundle)) == len(FILES) + 1
    write_sample(tmp_path, overwrite=True)
    assert hidden(tmp_path) == []


def test_a_reader_beside_a_writer_always_finds_a_whole_bundle(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    if not swap.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system cannot exchange folders")
    writer = start_writer(tmp_path)
    seen = set()
    try:
        until = time.monotonic() + 20
        while len(seen) < 10 and time.monotonic() < until:
            seen.add(open_bundle(tmp_path / "sample.trtb").identity)
    finally:
        writer.kill()
        writer.communicate()
    assert len(seen) >= 10
