"""The README is true: its Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import REPOSITORY

from trtbuild.cli import main

README = (REPOSITORY / "README.md").read_text()


def test_the_python_block_runs_and_says_what_it_says(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.strip().splitlines()) <= 12
    (tmp_path / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    code = block + "\nassert (same == prediction.segmentation).all()\n"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    (promised,) = re.findall(r"print\(.*?\)  # (.*)", block)
    assert result.stdout.strip() == promised


def test_every_verb_and_option_named_exists() -> None:
    for verb in re.findall(r"`trtbuild (\w+)", README):
        assert verb in main.commands
    rows = re.findall(r"^\| `trtbuild (\w+).*$", README, re.MULTILINE)
    assert set(rows) == set(main.commands)
    for line in re.findall(r"^\| `trtbuild .*$", README, re.MULTILINE):
        verb = line.split()[2].strip("`")
        known = {name for param in main.commands[verb].params for name in (*param.opts, *param.secondary_opts)}
        for option in re.findall(r"`(--?[\w-]+)", line) + re.findall(r" (--?\w+) ", line.split("`")[1]):
            assert option in known, f"{verb} has no {option}"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_to_files(link: str) -> None:
    assert link.startswith("https://") or (REPOSITORY / link).exists()


def test_make_targets_named_exist() -> None:
    targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make (\w+)", README) + re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert target in targets
