"""Engines that were built before: found again by what they were built from, never by their own bytes.

Two builds of one network give different bytes, so the key is the ONNX, the settings that matter, the shapes, and the
TensorRT and the device that the engine is for. Each engine is one file in the user's cache folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtbuild.cachefolder import Damaged, Foreign, bound, cache_folder, discard, read_facts, read_kept, write_kept
from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.build import plan_from_onnx
from trtbuild.engine.tensorrt.key import EngineKey, changes, engine_key, key_from_facts
from trtbuild.engine.tensorrt.layers_file import facts_from_table, table_from_facts
from trtbuild.engine.tensorrt.progress import Tell
from trtbuild.engine.tensorrt.timing import keep_timing_cache, timing_cache
from trtbuild.engine.tensorrt.values import Plan, Shapes
from trtbuild.errors import OutputError, TrtbuildError
from trtbuild.nvinfer import Nvinfer
from trtbuild.spec import TensorSpec, json_from_value, value_from_json

LIMIT = 20 << 30
"""Bytes that the folder may hold."""
__all__ = ["EngineKey", "difference", "engine_key", "plan_or_build", "store_plan", "stored_plan"]

ENDING = ".kept"
END_OF_TIME = 253402300800.0
"""Seconds; the year 10000, which Python's calendar does not have."""


def stored_plan(folder: Path, key: EngineKey, report: Callable[[str], None] = lambda line: None) -> Plan | None:
    """The engine of a key, None where there is none.

    A damaged one is reported and removed. Reading makes it the one that was used last.
    """
    found = _stored(folder, key, report)
    return None if found is None else found[0]


def store_plan(folder: Path, key: EngineKey, plan: Plan, *, name: str, limit: int = LIMIT) -> None:
    """Keeps an engine; what was not used for the longest time goes while the folder holds more than `limit` bytes.

    Args:
        folder: `cache_folder("engines")`.
        key: what it was built from.
        plan: the engine.
        name: of its network, for `difference`.
        limit: may be exceeded by the engine that was just written, which stays.

    Raises:
        OutputError: it cannot be written.
    """
    facts = {
        "key": key.facts,
        "name": name,
        "built": time.time(),
        "inputs": json_from_value(plan.inputs),
        "outputs": json_from_value(plan.outputs),
        "table": None if plan.table is None else facts_from_table(plan.table),
        "warnings": list(plan.warnings),
        "seconds": plan.seconds,
    }
    write_kept(_path(folder, key), facts, plan.content)
    bound(folder, (ENDING,), newest=_path(folder, key), limit=limit)


def difference(folder: Path, key: EngineKey, name: str) -> tuple[str, ...] | None:
    """What differs from the newest kept engine of the same network name, in words; None where there is no such one."""
    found = [(built, other) for known, built, other in _all_keys(folder) if known == name]
    return changes(max(found, key=lambda each: each[0])[1], key) if found else None


def plan_or_build(
    model: bytes | Path,
    *,
    name: str,
    nvinfer: Nvinfer,
    config: TensorRTConfig,
    shapes: Shapes,
    device: Mapping[str, str],
    tell: Tell,
    report: Callable[[str], None],
    build: Callable[..., Plan] = plan_from_onnx,
) -> Plan:
    """The engine that was built from the same before, or a new one, which is kept.

    Args:
        model: the typed ONNX file, or its bytes; a build from the file takes less memory.
        name: of the network, for people.
        nvinfer, config, shapes, tell: as `plan_from_onnx` takes them.
        device: what the engine is for: "capabilities", or "gpu" and "capability".
        report: called with a line per step: what is used again, or what has changed.
        build: `plan_from_onnx`.

    Raises:
        OutputError: the cache folder cannot be used.
        TrtbuildError: what `build` raises.
    """
    folder, key = cache_folder("engines"), engine_key(model, config, nvinfer, shapes, device)
    found = _stored(folder, key, report)
    if found is not None:
        plan, built = found
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(built))
        report(f"reusing the engine of {name}, built {when} in {plan.seconds:.1f} s")
        return plan
    changed = difference(folder, key, name)
    report(f"building the engine of {name}{': changed since the last one: ' * bool(changed)}{'; '.join(changed or ())}")
    known = timing_cache(nvinfer, config, device, report)
    plan = build(model, nvinfer=nvinfer, config=config, shapes=shapes, tell=tell, timing_cache=known)
    _keep(f"what was measured for {name}", report,
          lambda: keep_timing_cache(nvinfer, config, device, plan, known, report))  # fmt: skip
    _keep(f"the engine of {name}", report, lambda: store_plan(folder, key, plan, name=name))
    return plan


def _keep(what: str, report: Callable[[str], None], keep: Callable[[], None]) -> None:
    """Goes on where it fails: the engine itself is there, and what is lost is a shorter wait next time."""
    try:
        keep()
    except OutputError as error:
        report(f"{what} is not kept for the next time: {' '.join(str(error).split())}")


def _path(folder: Path, key: EngineKey) -> Path:
    return folder / f"{key.digest}{ENDING}"


def _plan(facts: Mapping[str, Any], content: bytes) -> Plan:
    try:
        table = facts["table"]
        return Plan(
            content=content,
            inputs=tuple(value_from_json(TensorSpec, spec) for spec in facts["inputs"]),
            outputs=tuple(value_from_json(TensorSpec, spec) for spec in facts["outputs"]),
            table=None if table is None else table_from_facts(table),
            warnings=tuple(facts["warnings"]),
            seconds=float(facts["seconds"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, TrtbuildError) as error:  # a ValueError is pydantic's
        raise Damaged(f"its facts are not those of this version: {' '.join(str(error).split()):.200}") from error


def _stored(folder: Path, key: EngineKey, report: Callable[[str], None]) -> tuple[Plan, float] | None:
    """The engine, and when it was built in seconds since 1970."""
    path = _path(folder, key)
    try:
        facts, content = read_kept(path)
        if facts.get("key") != key.facts:
            raise Damaged("it is of another key")
        return _plan(facts, content), _built(facts)
    except FileNotFoundError:
        return None
    except Foreign as error:
        report(f"a kept engine is not yours and is not used; it is built again: {error} ({path})")
        return None
    except (Damaged, OSError) as error:
        report(f"a kept engine is damaged, and is built again: {error} ({path.name})")
        discard(path)  # what cannot be removed is replaced after the build, or reported again
        return None


def _entries(folder: Path) -> list[Path]:
    """The kept engines, without what another process is just writing: that has the same ending behind a dot."""
    return [path for path in folder.glob(f"*{ENDING}") if not path.name.startswith(".")]


def _all_keys(folder: Path) -> Iterator[tuple[str, float, EngineKey]]:
    """Name, time of the build and key of what is kept and can be read."""
    for path in _entries(folder):
        with suppress(Damaged, FileNotFoundError):  # said when it is to be used
            facts = read_facts(path)
            yield str(facts.get("name")), _built(facts), key_from_facts(facts.get("key"))


def _built(facts: Mapping[str, Any]) -> float:
    """When, in seconds since 1970."""
    built = facts.get("built")
    if not isinstance(built, float) or not math.isfinite(built) or not 0 <= built < END_OF_TIME:
        raise Damaged("it does not say when it was built")
    return built
