"""`export` and `clean`: a model folder becomes ONNX files; an ONNX file becomes a clean one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trtbuild.atomic import output_error, write_whole
from trtbuild.errors import OutputError
from trtbuild.spec import json_from_value

if TYPE_CHECKING:
    from trtbuild.graph import PassReport, TableRow
    from trtbuild.source import SourceConfig

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One fold as written, and its largest difference to PyTorch as a share of the largest logit."""

    fold: str
    file: Path
    max_error: float


@dataclass(frozen=True, kw_only=True)
class CleanedFile:
    """What cleaning did to a file: counts before and after, and one report per pass."""

    rows: tuple[TableRow, ...]
    reports: tuple[PassReport, ...]


def export_folder(config: SourceConfig, output: Path, *, overwrite: bool, report: Report) -> tuple[ExportedFile, ...]:
    """Writes `fold_X.onnx`, its golden input and logits (`.npy`), spec.json, plans.json and dataset.json.

    Raises:
        OutputError: the folder holds something already and `overwrite` is not set, or cannot be written.
    """
    from trtbuild.source import export_model

    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise OutputError("The output is not empty.", where=output, hint="choose another folder, or add --overwrite")
    exported = export_model(config, report)
    for note in exported.notes:
        report(note)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, output) from error
    written = []
    for network in exported.networks:
        stem = f"fold_{network.fold}"
        for kind, array in (("input", network.golden_input), ("logits", network.golden_logits)):
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            write_whole(output / f"{stem}_{kind}.npy", buffer.getvalue())
        write_whole(output / f"{stem}.onnx", network.model)
        written.append(ExportedFile(fold=network.fold, file=output / f"{stem}.onnx", max_error=network.max_error))
    spec = {"spec": json_from_value(exported.spec), "mirror_axes": list(exported.mirror_axes)}
    write_whole(output / "spec.json", json.dumps(spec, indent=2).encode())
    write_whole(output / "plans.json", exported.plans)
    write_whole(output / "dataset.json", exported.dataset)
    return tuple(written)


def clean_file(
    source: Path, output: Path, *, rewrite_conv_transpose: bool, split_instance_norm: bool, overwrite: bool
) -> CleanedFile:
    """Cleans one ONNX file. `output` may be `source`; another source stays as it is."""
    from trtbuild.graph import clean, load_onnx, save_onnx, table_from_clean

    if output.exists() and not overwrite:
        raise OutputError("The output exists.", where=output, hint="choose another name, or add --overwrite")
    before = load_onnx(source)
    result = clean(before, rewrite_conv_transpose=rewrite_conv_transpose, split_instance_norm=split_instance_norm)
    save_onnx(result.model, output)
    return CleanedFile(rows=table_from_clean(before, result), reports=result.reports)
