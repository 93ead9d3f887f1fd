"""End to end beside nnU-Net's own way on the same card: an image in host memory becomes labels in host memory.

    python benchmarks/gpu/beside_nnunet.py --output rows.jsonl --work FOLDER

nnU-Net runs as its predictor does by default: autocast, cudnn.benchmark, everything on the device, without mirroring.
trtbuild runs a TensorRT engine in FP16 where this card does, else the same torch network behind the engine seam. Each
contender is a process of its own; times are taken in the order ABBA, memory in a run alone (NVML, at its peak).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
from card import Card, peak_used
from default_model import CONTENDER, built_bundle, default_model
from interleaved import Times, abba
from targets import CLASSES, faster_target, memory_target
from verdicts import Row, write_rows
from ways import NNUNET

SHAPE, SPACING = (160, 320, 320), (1.2, 0.8, 0.8)
"""192 x 256 x 256 voxels on the network's grid."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the image that it segments; `bundle` has its TensorRT engine, None takes torch's network."""

    classes: int
    model: Path
    bundle: Path | None
    work: Path
    shape: tuple[int, ...] = SHAPE
    spacing: tuple[float, ...] = SPACING
    device: str = "cuda"

    def labels(self, who: str) -> Path:
        """Where a contender leaves its labels."""
        return self.work / f"{who}_{self.classes}.npy"

    def command(self, who: str) -> list[str]:
        """Of a contender's process."""
        numbers = [",".join(map(str, values)) for values in (self.shape, self.spacing)]
        command = [sys.executable, str(CONTENDER), "run", who, str(self.model), *numbers, str(self.labels(who))]
        command += ["--device", self.device]
        return command + (["--bundle", str(self.bundle)] if who == "trtbuild" and self.bundle else [])


class Contender:
    """A contender's process, ready to run the case."""

    def __init__(self, case: Case, who: str) -> None:
        self._errors = case.work / f"{who}.err"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                case.command(who), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.first = self._answer("ready")

    def run(self) -> float:
        """Seconds of one run."""
        assert self._process.stdin is not None  # noqa: S101 # it was asked for
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer("seconds")

    def close(self) -> None:
        self._process.communicate()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self, key: str) -> float:
        assert self._process.stdout is not None  # noqa: S101 # it was asked for
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"a contender ended:\n{self._errors.read_text()[-3000:]}")
        return float(json.loads(line)[key])


def times_of(case: Case, rounds: int) -> Times:
    """Both contenders, interleaved."""
    with Contender(case, "trtbuild") as ours, Contender(case, "nnunet") as theirs:
        return abba(ours.run, theirs.run, rounds)


def memory_of(case: Case, who: str, card: Any) -> int:
    """Bytes of device memory that a contender takes at its peak: opening, warming up and one run, alone on the card."""
    before = card.used()
    with peak_used(card) as peak, Contender(case, who) as contender:
        contender.run()
    return int(peak.used - before)


def equal_share(case: Case) -> float:
    """Per cent of the voxels in which both contenders' labels are the same."""
    ours, theirs = (np.load(case.labels(who)) for who in ("trtbuild", "nnunet"))
    return 100 * float(np.mean(ours == theirs))


def rows_of_times(case: Case, times: Times, engine: str, equal: float, why: str = "") -> list[Row]:
    """How many times faster; `why` it is torch's network that ours has."""
    note = "; ".join(text for text in (engine, times.text, why) if text)
    return [
        replace(faster_target(case.classes, engine), value=times.ratio, note=note),
        Row(part="beside nnU-Net", name=f"equal voxels, {case.classes} classes", value=equal, unit="%", note=engine),
    ]


def row_of_memory(case: Case, ours: int, theirs: int, engine: str) -> Row:
    """Ours as a share of theirs."""
    note = f"{engine}; ours {ours / 2**30:.2f} GiB, theirs {theirs / 2**30:.2f} GiB"
    return replace(memory_target(case.classes), value=100 * ours / theirs, note=note)


def rows_of_classes(classes: int, work: Path, rounds: int, card: Any) -> Iterator[Row]:
    """Everything for a number of classes."""
    work.mkdir(parents=True, exist_ok=True)
    model = default_model(classes, work)
    bundle, said = built_bundle(model, work)
    engine, why = (said, "") if bundle else ("torch", f"no TensorRT: {said}")
    case = Case(classes=classes, model=model, bundle=bundle, work=work)
    times = times_of(case, rounds)
    yield from rows_of_times(case, times, engine, equal_share(case), why)
    if isinstance(card, str):
        yield replace(memory_target(classes), note=card)
    else:
        ours, theirs = (memory_of(case, who, card) for who in ("trtbuild", "nnunet"))
        yield row_of_memory(case, ours, theirs, engine)


def opened_card() -> Card | str:
    """NVML's, or why there is none."""
    try:
        return Card()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"NVML: {error}"


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON lines, one per row.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="A folder for models and labels.")
@click.option("--classes", type=int, multiple=True, default=CLASSES, show_default=True, help="Repeat it for several.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of ABBA; each is two pairs.")
def main(output: Path, work: Path, classes: tuple[int, ...], rounds: int) -> None:
    """Measures both contenders on the first GPU."""
    import_module(NNUNET)  # before anything is built for a comparison that nobody can make
    write_rows(
        output,
        (row for count in classes for row in rows_of_classes(count, work / f"classes_{count}", rounds, opened_card())),
    )


if __name__ == "__main__":
    main()
