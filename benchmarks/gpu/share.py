"""How much of a default 3d_fullres case without mirroring is outside the network: from the image in host memory to labels.

    python benchmarks/gpu/share.py --output rows.jsonl --work FOLDER

Time in the network is that of its calls on the stream, by CUDA events. Everything else counts as outside: upload,
preparation, gather, blend, the way back, download, and what the host makes the device wait for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from default_model import built_bundle, default_model
from events import Events, timed_engine
from targets import OUTSIDE, SHARE
from verdicts import Row, write_rows
from ways import body, device_path, seconds

SHAPE, SPACING = (200, 400, 400), (1.2, 0.8, 0.8)
"""240 x 320 x 320 voxels on the network's grid: 3 x 4 x 4 windows of 128^3."""
CLASSES = 3
REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class Run:
    """Seconds of a case in all, and of its network's calls."""

    wall: float
    network: float

    @property
    def outside(self) -> float:
        """Per cent of the case."""
        return 100 * (1 - self.network / self.wall)


def runs_of(predict: Callable[[], float], taken: Callable[[], float], repeats: int) -> list[Run]:
    """`repeats` after two that do not count; `taken` gives the network's seconds since it was last asked."""
    found = [Run(wall=predict(), network=taken()) for _ in range(repeats + 2)]
    return found[2:]


def rows_of_share(runs: Sequence[Run], engine: str) -> list[Row]:
    """The median of the shares, judged; and what they are of."""
    outside = [run.outside for run in runs]
    wall, network = (statistics.median(getattr(run, name) for run in runs) for name in ("wall", "network"))
    note = f"{engine}; {min(outside):.1f} to {max(outside):.1f} % over {len(runs)} runs"
    return [
        Row(part="share", name=OUTSIDE, value=statistics.median(outside), unit="%", limit=SHARE,
            at_least=False, note=note),
        Row(part="share", name="whole case", value=wall, unit="s", note=engine),
        Row(part="share", name="network of it", value=network, unit="s", note=engine),
    ]  # fmt: skip


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON lines, one per row.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="A folder for the model.")
def main(output: Path, work: Path) -> None:
    """Measures a case on the first GPU, with TensorRT where this card runs it, else with torch's network."""
    model, image = default_model(CLASSES, work), body(SHAPE, SPACING)
    bundle, _ = built_bundle(model, work)
    with device_path(model, bundle) as path:
        engine, runner = timed_engine(path.engine, Events(path.gpu))
        runs = runs_of(lambda: seconds(lambda: path.predict(image, engine))[0], runner.taken, REPEATS)
        name = path.engine.runner.describe().backend
    write_rows(output, rows_of_share(runs, name))


if __name__ == "__main__":
    main()
