"""The table of rooms: who may import whom, and which foreign library belongs where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trtbuild
import trtbuild_calibration

PACKAGE = Path(trtbuild.__file__).parent
LEAVES = {"errors", "spec", "config", "atomic", "options", "machine", "compiled", "half", "nvinfer", "cachefolder"}
LIGHT = {"numpy", "trtbuild"} | set(sys.stdlib_module_names)

# room -> (rooms of ours that it may import besides the leaves, foreign packages)
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "source": (set(), {"torch", "dynamic_network_architectures", "onnx", "onnxruntime", "pydantic"}),
    "graph": (set(), {"onnx", "onnx_graphsurgeon", "google"}),
    "engine": ({"runtime"}, set()),
    "stitch": (set(), set()),
    "volume": (set(), {"scipy", "SimpleITK", "nibabel", "imageio", "tifffile", "PIL", "pydicom", "highdicom"}),
    "runtime": ({"stitch", "volume"}, {"openvino", "onnxruntime", "pycuda", "cuda"}),
    "accuracy": (set(), {"scipy", "surface_distance"}),
    "bundle": (set(), {"pydantic"}),
    "steps": (
        {"source", "graph", "engine", "stitch", "volume", "runtime", "accuracy", "bundle"},
        {"threadpoolctl", "trtbuild_calibration"},
    ),
    "cli": ({"commands"}, {"click"}),
    "commands": ({"steps", "source", "show", "show_evaluation", "show_layers", "show_precision"}, {"click"}),
    "show": ({"steps"}, {"click", "rich"}),
    "show_evaluation": ({"steps", "show"}, {"rich"}),
    "show_layers": ({"steps", "show"}, {"rich", "jinja2"}),
    "show_precision": ({"show"}, {"rich"}),
    "options": (set(), {"click"}),
    "spec": (set(), {"pydantic"}),
    "errors": (set(), set()),
    "config": (set(), set()),
    "atomic": (set(), set()),
    "machine": (set(), set()),
    "compiled": (set(), {"numba", "llvmlite"}),
    "half": (set(), set()),
    "nvinfer": (set(), set()),  # loads tensorrt or tensorrt_rtx by name, one of them per process
    "cachefolder": (set(), set()),
    "__init__": ({"steps", "bundle"}, set()),
    "__main__": ({"cli"}, set()),
}

# room -> foreign packages that it names in type annotations only
FOR_TYPES: dict[str, set[str]] = {"steps": {"onnx"}}

# a library that only these files may import
DOORS = {
    "openvino": {"runtime/openvino.py"},
    "onnxruntime": {"runtime/onnxruntime.py", "source/export.py"},
    "onnx_graphsurgeon": {"graph/surgeon.py", "graph/files.py"},
    "SimpleITK": {"volume/io/simpleitk_io.py", "volume/io/simpleitk_reorient_io.py"},
    "highdicom": {"volume/io/dicom_seg.py"},
    "numba": {"compiled.py"},
    "llvmlite": {"compiled.py"},
    "pycuda": {"runtime/device.py"},
    "cuda": {"runtime/nvrtc.py", "runtime/gpu/graph.py"},
    "rich": {"show.py", "show_evaluation.py", "show_layers.py", "show_precision.py"},
    "jinja2": {"show_layers.py"},
    "surface_distance": {"accuracy/surface.py"},
    # prediction, and compilation in FP32, do without it
    "trtbuild_calibration": {
        f"steps/precision/{name}.py"
        for name in (
            "arrays",
            "calibrate",
            "cpu",
            "data",
            "decide",
            "device",
            "facts",
            "gate",
            "job",
            "network",
            "raw",
            "typed",
            "verbs",
        )
    },
}

CALIBRATION = Path(trtbuild_calibration.__file__).parent
CALIBRATION_FOREIGN = {"numpy", "numba", "blosc2"}
CALIBRATION_DOORS = {"numba": {"kernels.py"}, "blosc2": {"arrays.py"}}


def imports(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Dotted names of everything that a file imports, at any depth of its code.

    Without `for_types` what stands below `if TYPE_CHECKING` is left out: it is never loaded.
    """
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unloaded = {below for block in blocks for node in block.body for below in ast.walk(node)}
    for node in ast.walk(tree):
        if node in unloaded and not for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "trtbuild")


FILES = sorted(PACKAGE.rglob("*.py"))
CALIBRATION_FILES = sorted(CALIBRATION.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    ours, foreign = ROOMS[room_of(path)]
    loaded = set(imports(path, for_types=False))
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "trtbuild":
            room = rest.split(".")[0]
            if room and room != "__version__":
                assert room in LEAVES | ours | {room_of(path)}, f"{path} imports the room {room}"
        elif top not in LIGHT:
            allowed = foreign if name in loaded else foreign | FOR_TYPES.get(room_of(path), set())
            assert top in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_has_one_door(library: str) -> None:
    users = {str(p.relative_to(PACKAGE)) for p in FILES if any(n.split(".")[0] == library for n in imports(p))}
    assert users <= DOORS[library]


@pytest.mark.parametrize("path", CALIBRATION_FILES, ids=lambda p: p.name)
def test_the_calibration_package_stands_alone(path: Path) -> None:
    """It knows nothing of trtbuild: no graph, no runner, no bundle."""
    for name in imports(path):
        top = name.partition(".")[0]
        allowed = CALIBRATION_FOREIGN | {"trtbuild_calibration"} | set(sys.stdlib_module_names)
        assert top in allowed, f"{path} imports {name}"
        assert path.name in CALIBRATION_DOORS.get(top, {path.name}), f"{path} imports {name}"


def test_the_calibration_package_can_be_imported_without_its_readers() -> None:
    code = "import sys, trtbuild_calibration; print([n for n in ('blosc2', 'trtbuild', 'onnx') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_imports_nnunet() -> None:
    files = (*FILES, *CALIBRATION_FILES)
    assert not [p for p in files for name in imports(p) if name.startswith("nnunetv2")]


def test_importing_trtbuild_loads_no_heavy_library() -> None:
    heavy = (
        "torch",
        "onnx",
        "onnxruntime",
        "openvino",
        "scipy",
        "numba",
        "SimpleITK",
        "nibabel",
        "pydantic",
        "rich",
        "click",
        "numpy",
    )
    code = f"import sys, trtbuild; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_loads_no_heavy_library() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "openvino", "scipy", "numba", "SimpleITK", "nibabel", "rich")
    code = (
        "import sys; from trtbuild.cli import run; run(['predict', '-h']); "
        f"print([n for n in {heavy} if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


def test_all_names_what_is_visible() -> None:
    assert len(trtbuild.__all__) <= 25
    for name in trtbuild.__all__:
        assert hasattr(trtbuild, name)


def test_functions_stay_short() -> None:
    lengths = []
    for path in (*FILES, *CALIBRATION_FILES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                lengths.append(length)
                assert length <= 90, f"{path}:{node.lineno} {node.name} has {length} lines"
    assert sorted(lengths)[int(0.9 * len(lengths))] <= 40


def test_no_assert_and_no_bare_except_guards_input() -> None:
    for path in (*FILES, *CALIBRATION_FILES):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}:{node.lineno}"
