"""The commands of NVIDIA's tools that build the engine that trtbuild builds: trtexec or tensorrt_rtx, and Polygraphy.

Where the names are from: trtexec's of TensorRT 10 and 11 from samples/common/sampleOptions.cpp of
github.com/NVIDIA/TensorRT; --computeCapabilities and --useGpu of tensorrt_rtx, trtexec's twin for TensorRT-RTX, from
docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html; Polygraphy's from its --help.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.settings import CURRENT
from trtbuild.engine.tensorrt.values import Shapes
from trtbuild.errors import OutputError

POLYGRAPHY_LEVELS: Mapping[str, str] = {"ampere+": "ampere_plus", "sameComputeCapability": "same_compute_capability"}
TOOLS: Mapping[str, str] = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
TIMING_CACHE = "timing.cache"
BUNDLE = ".trtb"


def check_script(path: Path, *, taken: Sequence[Path], overwrite: bool) -> None:
    """Before any work: whether a script may be written there.

    Args:
        path: where it is to go.
        taken: all that the command reads and writes, files and folders. Nothing in such a folder is replaced.
        overwrite: whether a file that is there may be replaced.

    Raises:
        OutputError: it is an input or an output, lies in a bundle or in no folder, or exists.
    """
    if not path.parent.is_dir():
        raise OutputError("There is no such folder for the script.", where=path.parent,
                          hint="make it, or choose another one with --emit-script")  # fmt: skip
    real = path.resolve()
    for other in taken:
        if _is_same(path, other) or (real.is_file() and other.is_dir() and other.resolve() in real.parents):
            raise OutputError("The script would replace an input or an output.", expected="a file of its own",
                              got=path, where=other, hint="choose another name with --emit-script")  # fmt: skip
    if any(part.suffix.lower() == BUNDLE for place in (path.absolute(), real) for part in (place, *place.parents)):
        raise OutputError("A bundle holds nothing but its own files.", expected="a place outside of it", where=path,
                          hint="choose another name with --emit-script, such as build.sh")  # fmt: skip
    if path.is_symlink() or path.exists():
        if not path.is_file():
            raise OutputError("The script would replace what is no file.", expected="a file, or nothing", where=path,
                              hint="choose another name with --emit-script")  # fmt: skip
        if not overwrite:
            raise OutputError("The script exists.", where=path, hint="choose another name, or add --overwrite")


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def equivalent_commands(
    config: TensorRTConfig, shapes: Shapes, *, onnx: str, engine: str, backend: str
) -> tuple[str, ...]:
    """Lines for a shell: comments and, last of each tool's, its command.

    Args:
        config: how trtbuild built the engine; its batches are not looked at.
        shapes: the engine's profile.
        onnx: the typed ONNX file that the engine was built from. Precision is in it, so that there is no option
            for it: the network is strongly typed.
        engine: the file that the commands write.
        backend: "tensorrt" or "tensorrt-rtx".

    Returns:
        Each option of `config` is in the command, or named in a comment above it where the tool has none. In place of
        a command of trtexec's there is a comment where it cannot be given the name of an input.
    """
    tool, options = _tool(config, shapes, onnx, engine, backend), _polygraphy(config, shapes, backend)
    polygraphy = ["polygraphy", "convert", onnx, "--convert-to", "trt", "-o", engine, "--strongly-typed", *options]
    variable = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if backend == "tensorrt-rtx" else ""
    return (
        f"# {TOOLS[backend]}",
        *_comments(config, backend, polygraphy=False),
        _unwritable(shapes, TOOLS[backend]) or shlex.join(tool),
        "# Polygraphy",
        *_comments(config, backend, polygraphy=True),
        variable + shlex.join(polygraphy),
    )


def script(title: str, commands: Sequence[str]) -> bytes:
    """A shell script of `equivalent_commands`. Either tool writes each engine, so a missing one stops nothing."""
    head = ("#!/bin/sh", f"# {title}", "# Each engine stands here twice: by NVIDIA's own tool, and by Polygraphy.")
    lines = (_harmless(line) if line.startswith("#") else line for line in (*head, *commands))
    return ("\n".join(lines) + "\n").encode()


def _harmless(comment: str) -> str:
    """A comment that is one line: a name in it may hold line ends, and what is behind one would be run."""
    return "".join(sign if sign.isprintable() else "?" for sign in comment)


def _tool(config: TensorRTConfig, shapes: Shapes, onnx: str, engine: str, backend: str) -> list[str]:
    """trtexec, or tensorrt_rtx, whose networks are strongly typed without being told."""
    options = [f"--onnx={onnx}", f"--saveEngine={engine}", "--skipInference"]
    options += ["--stronglyTyped"] if backend == "tensorrt" else []
    for number, name in enumerate(("minShapes", "optShapes", "maxShapes")):
        profile = [f"{_quoted(tensor)}:{'x'.join(map(str, three[number]))}" for tensor, three in shapes.items()]
        options += [f"--{name}={','.join(profile)}"] if profile else []
    given = {
        f"--memPoolSize=workspace:{config.workspace}": config.workspace is not None,
        f"--builderOptimizationLevel={config.optimization_level}": True,
        "--noTF32": not config.tf32,
        "--sparsity=enable": config.sparsity,
        "--allowWeightStreaming": config.weight_streaming,
        "--stripWeights": config.strip_plan,
        "--profilingVerbosity=detailed": True,
        "--verbose": config.verbose,
    }
    if backend == "tensorrt":
        given |= {
            f"--hardwareCompatibilityLevel={config.hardware_compatibility}": config.hardware_compatibility != "none",
            "--versionCompatible": config.version_compatible,
            f"--timingCacheFile={TIMING_CACHE}": config.timing_cache,
            "--noBuilderCache": not config.timing_cache,
        }
    elif config.compute_capabilities == (CURRENT,):
        given["--useGpu"] = True
    else:
        given[f"--computeCapabilities={','.join(config.compute_capabilities)}"] = bool(config.compute_capabilities)
    return [TOOLS[backend], *options, *(option for option, is_given in given.items() if is_given)]


def _polygraphy(config: TensorRTConfig, shapes: Shapes, backend: str) -> list[str]:
    options: list[str] = []
    for number, name in enumerate(("min", "opt", "max")):
        profile = [f"{tensor}:[{','.join(map(str, three[number]))}]" for tensor, three in shapes.items()]
        options += [f"--trt-{name}-shapes", *profile] if profile else []
    given: dict[tuple[str, ...], bool] = {
        ("--pool-limit", f"workspace:{config.workspace}M"): config.workspace is not None,
        ("--builder-optimization-level", str(config.optimization_level)): True,
        ("--tf32",): config.tf32,
        ("--sparse-weights",): config.sparsity,
        ("--weight-streaming",): config.weight_streaming,
        ("--strip-plan",): config.strip_plan,
        ("--profiling-verbosity", "detailed"): True,
        ("-vv",): config.verbose,
    }
    if backend == "tensorrt":
        level = POLYGRAPHY_LEVELS.get(config.hardware_compatibility, "none")
        given |= {
            ("--hardware-compatibility-level", level): config.hardware_compatibility != "none",
            ("--version-compatible",): config.version_compatible,
            ("--load-timing-cache", TIMING_CACHE, "--save-timing-cache", TIMING_CACHE): config.timing_cache,
        }
    elif config.compute_capabilities == (CURRENT,):
        given[("--use-gpu",)] = True
    else:
        capabilities = [f"{name[:-1]}.{name[-1]}" for name in config.compute_capabilities]
        given[("--compute-capabilities", *capabilities)] = bool(capabilities)
    return [*options, *(word for words, is_given in given.items() if is_given for word in words)]


def _comments(config: TensorRTConfig, backend: str, *, polygraphy: bool) -> Sequence[str]:
    """What is set and has no option in a tool."""
    missing = []
    if config.refit and not config.strip_plan:  # a stripped plan takes its own weights again without being told
        missing.append("refit: a plan that takes the same weights again (REFIT_IDENTICAL)")
    if backend == "tensorrt" and config.compute_capabilities:
        missing.append(f"compute_capabilities={','.join(config.compute_capabilities)}: an engine is for this GPU")
    if backend == "tensorrt-rtx" and config.hardware_compatibility != "none":
        missing.append(f"hardware_compatibility={config.hardware_compatibility}: TensorRT-RTX has none")
    if backend == "tensorrt-rtx" and config.version_compatible:
        missing.append("version_compatible: TensorRT-RTX has none")
    if backend == "tensorrt" and polygraphy and not config.timing_cache:
        missing.append("timing_cache=False: nothing is kept, but within a build times are used again")
    return [_harmless(f"# no option for {line}") for line in missing]


def _unwritable(shapes: Shapes, tool: str) -> str | None:
    """A comment where trtexec cannot be told a shape: it splits at commas and quotes wherever they stand."""
    for name in shapes:
        if "," in name or "'" in name:
            return _harmless(f"# no command: {tool} takes no input whose name holds a comma or a quote: {name}")
    return None


def _quoted(tensor: str) -> str:
    """trtexec wants names with its own separators in single quotes, which it takes off."""
    return f"'{tensor}'" if ":" in tensor else tensor
