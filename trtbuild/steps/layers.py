"""`inspect --layers`: the kernels of a bundle's engines, what they compute in and what will be slow."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trtbuild.bundle import Bundle, open_bundle
from trtbuild.engine.tensorrt.coverage import Coverage, coverage, warnings
from trtbuild.engine.tensorrt.layers_file import MAX_SIZE, LayersFile, facts_from_table, read_layers_file
from trtbuild.errors import EngineError
from trtbuild.spec import BuildRecord, json_from_value, value_from_json

CPU_BACKENDS = ("openvino", "onnxruntime")


def bundle_layers(path: Path) -> dict[str, Any]:
    """The layers of every engine that has a table, and the engines that have none with the reason.

    Raises:
        EngineError: no engine has one, or a file of layers cannot be read.
        BundleError: as `open_bundle`, and a file of layers is missing or was changed.
    """
    bundle = open_bundle(path)
    records = bundle.manifest.engines
    without = [_reason(record) for record in records if "layers" not in record.options]
    if len(without) == len(records):
        raise EngineError("No engine of this bundle has a layer table.", expected="an engine of TensorRT",
                          got="; ".join(without) or "no engine", where=path,
                          hint=f"trtbuild inspect {path} shows what each engine computes in")  # fmt: skip
    return {
        "path": str(path),
        "identity": bundle.identity,
        "engines": [_facts(record, _layers(bundle, record)) for record in records if "layers" in record.options],
        "without": without,
    }


def engine_layers(path: Path) -> dict[str, Any]:
    """The same of one engine file, NAME.engine, of which NAME.engine.json beside it tells.

    Raises:
        EngineError: there is no such file, it is damaged, not of this engine, or holds no layers.
    """
    facts = path.with_name(f"{path.name}.json")
    try:
        content, plan = facts.read_bytes()[: MAX_SIZE + 1], path.read_bytes()
        data = json.loads(content)
        record = value_from_json(BuildRecord, data["record"])
        written = data["layers"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:  # pydantic's error is a ValueError
        raise EngineError("What is known of an engine cannot be read.", expected="NAME.engine and NAME.engine.json, as "
                          "trtbuild compile NET.onnx writes them", got=f"{type(error).__name__}: {error}"[:200],
                          where=facts, hint="compile it again")  from error  # fmt: skip
    digest = hashlib.sha256(plan).hexdigest()
    if record.options.get("sha256") != digest:
        raise EngineError("The engine is not the one that was described.", expected=record.options.get("sha256"),
                          got=digest, where=path, hint="compile it again")  # fmt: skip
    if written is None:
        raise EngineError("TensorRT told no layers when this engine was built.", where=path)
    return {
        "path": str(path),
        "identity": digest,
        "engines": [_facts(record, read_layers_file(json.dumps(written).encode()))],
        "without": [],
    }


def _reason(record: BuildRecord) -> str:
    if record.backend in CPU_BACKENDS:
        why = "a CPU backend has no such table; plain inspect shows what it computes in"
    else:
        why = "TensorRT told no layers when it was built"
    return f"{record.network} ({record.backend}): {why}"


def _layers(bundle: Bundle, record: BuildRecord) -> LayersFile:
    name = record.options["layers"]
    if not isinstance(name, str):
        raise EngineError("The record of an engine does not name its file of layers.", expected="a path in the bundle",
                          got=name, where=f"{bundle.path}: engine of {record.network}",
                          hint="compile the bundle again")  # fmt: skip
    entry = bundle.manifest.files.get(name)
    if entry is not None and entry.size > MAX_SIZE:
        raise EngineError("A file of layers is larger than any real one.", expected=f"at most {MAX_SIZE} bytes",
                          got=f"{entry.size} bytes", where=bundle.path / name,
                          hint="do not use this bundle unless you know who made it")  # fmt: skip
    content = bundle.file(name).read_bytes()
    try:
        return read_layers_file(content)
    except EngineError as error:
        place = f"{bundle.path / name}" + (f": {error.where}" if error.where is not None else "")
        raise EngineError(error.what, expected=error.expected, got=error.got, where=place, hint=error.hint) from error


def _facts(record: BuildRecord, layers: LayersFile) -> dict[str, Any]:
    found = coverage(layers.table, layers.operations)
    table = facts_from_table(layers.table)
    return {
        "network": record.network,
        "backend": record.backend,
        "version": record.version,
        "precision": record.precision,
        "inference_precision": record.inference_precision,
        "device": json_from_value(record.device),
        "device_per_batch": json_from_value(record.memory.device_per_batch),
        "activation_memory": table["activation_memory"],
        "weights_memory": table["weights_memory"],
        "coverage": _coverage_facts(found),
        "warnings": list(warnings(layers.table, layers.operations)),
        "layers": [
            {**layer, "operations": found.layers.get(index, 0), "share": _share(found, index)}
            for index, layer in enumerate(json_from_value(table["layers"]))
        ],
    }


def _coverage_facts(found: Coverage) -> dict[str, Any]:
    return {
        "operations": found.operations,
        "precisions": dict(found.precisions),
        "shares": {precision: found.share(precision) for precision in found.precisions},
        "unknown": list(found.unknown),
    }


def _share(found: Coverage, index: int) -> float:
    return found.layers.get(index, 0) / found.operations if found.operations else 0.0
