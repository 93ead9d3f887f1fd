"""A folder run that is killed at any moment leaves whole files only; continued, it ends as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import random
import secrets
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from killed_run import STAGES
from models import subject

from trtbuild.atomic import PREFIX
from trtbuild.cli import run
from trtbuild.steps.folder_run.record import RECORD

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
HERE = Path(__file__).parent
CASES, END = 6, ".nii.gz"
COMMON = {"dataset.json", "plans.json", RECORD}
TRIES = 5
"""A moment may be over before the kill arrives; then the next one comes earlier, and the last at once."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The folder of images, and a run that nobody disturbed: its files, and how long its stages took."""

    images: Path
    expected: dict[str, bytes]
    longest: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Death:
    """A killed run: the stages it was in, and the process that read its images."""

    inside: set[str]
    worker: int


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "images").mkdir()
    rng = np.random.default_rng(5)
    for case, channel in itertools.product(range(CASES), range(2)):
        image = sitk.GetImageFromArray(rng.normal(300, 90, (40, 56 + 2 * case, 56)).astype(np.int16))
        image.SetSpacing((0.7, 0.7, 0.8))
        sitk.WriteImage(image, str(folder / "images" / f"case{case}_{channel:04}{END}"), True)
    out, log = folder / "out", folder / "log"
    killed_run(log, "-", 0, 0, "alone", folder / "images", out, expected=0)
    starts: dict[str, float] = {}
    longest: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for seconds, stage, event in events(log):
        if event == "enter":
            starts[stage] = seconds
        elif event == "leave":
            longest[stage] = max(longest[stage], seconds - starts[stage])
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    assert expected.keys() == {f"case{n}{e}" for n in range(CASES) for e in (END, ".npz", ".pkl")} | COMMON
    return Scene(images=folder / "images", expected=expected, longest=longest)


def words(images: Path, out: Path) -> list[str]:
    return ["predict", str(subject("iso3d").bundle), "-i", str(images), "-o", str(out), "--save_probabilities"]


def killed_run(
    log: Path, stage: str, number: int, delay: float, who: str, images: Path, out: Path, *, expected: int
) -> None:
    command = [sys.executable, "killed_run.py", str(log), stage, str(number), str(delay), who, *words(images, out)]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert result.returncode == expected, result.stderr


def events(log: Path) -> Iterator[tuple[float, str, str]]:
    for line in log.read_text().splitlines():
        seconds, stage, event = line.split()
        yield float(seconds), stage, event


def death_in(stage: str, who: str, scene: Scene, folder: Path, rng: random.Random) -> Death:
    """A run killed within the stage of some case, in folder/out."""
    number = rng.randrange(3 * CASES if stage == "renaming" else CASES)
    delay = 0.0 if stage == "renaming" else rng.uniform(0, scene.longest[stage])
    for left in reversed(range(TRIES)):
        shutil.rmtree(folder / "out", ignore_errors=True)
        wait = delay if left else 0.0
        killed_run(folder / "log", stage, number, wait, who, scene.images, folder / "out", expected=-9)
        inside, worker = set[str](), 0
        for _, name, event in events(folder / "log"):
            if name == "worker":
                worker = int(event)
            else:
                (inside.add if event == "enter" else inside.discard)(name)
        if stage in inside:
            return Death(inside=inside, worker=worker)
        delay /= 3
    return pytest.fail(f"{stage} was over at once, {TRIES} times")


def check_whole(out: Path, scene: Scene) -> set[str]:
    """Every file under a final name is whole; returns the finished cases."""
    final = {path.name for path in out.iterdir() if not path.name.startswith(PREFIX)}
    for name in final - {RECORD}:
        assert (out / name).read_bytes() == scene.expected[name], name
    assert final >= COMMON
    assert cases_vouched_for(out) == sorted(f"case{n}" for n in range(CASES))
    finished = {name.removesuffix(END) for name in final if name.endswith(END)}
    for case in finished:
        assert {f"{case}.npz", f"{case}.pkl"} <= final, "the segmentation comes last"
    return finished


def cases_vouched_for(out: Path) -> list[str]:
    return sorted(json.loads((out / RECORD).read_bytes())["trtbuild"]["cases"])


def check_equal(out: Path, scene: Scene) -> None:
    """The folder holds what an undisturbed run writes, and nothing else."""
    there = {path.name: path.read_bytes() for path in out.iterdir()}
    assert there.keys() == scene.expected.keys()
    ours, theirs = (json.loads(files.pop(RECORD)) for files in (there, dict(scene.expected)))
    assert ours["trtbuild"] == theirs["trtbuild"]
    for name, content in there.items():
        assert content == scene.expected[name], name


def ended(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def trial(stage: str, who: str, scene: Scene, folder: Path, rng: random.Random) -> set[str]:
    """Kills, judges what is left, continues, and compares; returns the stages in which the run was killed."""
    folder.mkdir()
    death, out = death_in(stage, who, scene, folder, rng), folder / "out"
    if sys.platform == "linux":
        assert ended(death.worker), "the process that reads images outlived its run"
    kept = {case: (out / (case + END)).stat().st_mtime_ns for case in check_whole(out, scene)}
    assert run([*words(scene.images, out), "--continue_prediction"]) == 0
    check_equal(out, scene)
    assert {case: (out / (case + END)).stat().st_mtime_ns for case in kept} == kept, "finished cases stay as they are"
    return death.inside


def killed_often(times: int, scene: Scene, folder: Path) -> Counter[str]:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    moments: Counter[str] = Counter()
    for number, (who, stage) in enumerate(itertools.product(("alone", "both"), STAGES * (times // 2))):
        inside = trial(stage, who, scene, folder / str(number), rng)
        print(f"{number}: {stage}, {who}, in {', '.join(sorted(inside))}")
        moments[stage] += 1
        shutil.rmtree(folder / str(number))
    return moments


@pytest.mark.slow
def test_killed_at_20_moments_and_continued_the_outputs_equal_an_undisturbed_run(scene: Scene, tmp_path: Path) -> None:
    moments = killed_often(4, scene, tmp_path)
    assert moments.total() == 20
    assert min(moments[stage] for stage in STAGES) >= 3


@pytest.mark.parametrize(("stage", "who"), [("network", "alone"), ("renaming", "both")])
def test_killed_once_and_continued_the_outputs_equal_an_undisturbed_run(
    stage: str, who: str, scene: Scene, tmp_path: Path
) -> None:
    trial(stage, who, scene, tmp_path / "trial", random.Random(stage))
