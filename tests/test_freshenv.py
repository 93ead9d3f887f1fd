"""`predict` in an environment that has only what the wheel's base dependencies bring, and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
from models import REPOSITORY, subject
from reference import differing_voxels, segmentation_from_file

pytestmark = pytest.mark.freshenv


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and its base dependencies."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "-c", str(REPOSITORY / "tests" / "constraints.txt"), str(REPOSITORY)], check=True, timeout=600
    )
    return python


def test_predict_needs_neither_torch_nor_onnx_nor_nnunetv2(fresh_python: Path, tmp_path: Path) -> None:
    who = subject("iso3d")
    packages = subprocess.run(
        [str(fresh_python), "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    ).stdout
    installed = {entry["name"].lower() for entry in json.loads(packages)}
    assert not installed & {"torch", "onnx", "onnxruntime", "nnunetv2", "scikit-image", "batchgenerators"}
    out = tmp_path / "out"
    command = [
        str(fresh_python),
        "-m",
        "trtbuild",
        "predict",
        str(who.bundle),
        "-i",
        str(who.model.images),
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    labels = segmentation_from_file(who.reference("main"))
    assert differing_voxels(out / ("main" + who.model.file_ending), who.reference("main")) <= max(3, 5e-5 * labels.size)


def test_the_wheel_holds_no_demo_data_and_no_tests(fresh_python: Path) -> None:
    code = "import trtbuild, pathlib; print(pathlib.Path(trtbuild.__file__).parent)"
    package = Path(
        subprocess.run(
            [str(fresh_python), "-c", code], capture_output=True, text=True, check=True, cwd="/"
        ).stdout.strip()
    )
    assert (package / "py.typed").is_file()
    names = {path.suffix for path in package.rglob("*") if path.is_file()}
    assert names <= {".py", ".pyc", ".typed", ".md", ".cu", ".nbi", ".nbc"}
    assert sum(path.stat().st_size for path in package.rglob("*.py")) < 2e6


def test_compile_without_the_export_extra_says_what_to_install(fresh_python: Path, tmp_path: Path) -> None:
    command = [
        str(fresh_python),
        "-m",
        "trtbuild",
        "compile",
        str(subject("iso3d").model.folder),
        "-o",
        str(tmp_path / "a.trtb"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'trtbuild[export]'" in result.stderr
    assert "Traceback" not in result.stderr


OFFLINE = textwrap.dedent(
    """
    import socket, sys

    def refuse(*args, **kwargs):
        raise RuntimeError("a socket was opened")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
    from trtbuild.cli import run
    sys.exit(run(sys.argv[1:]))
    """
)


@pytest.mark.offline
def test_offline_compile_and_predict_open_no_socket(tmp_path: Path) -> None:
    who = subject("iso3d")
    bundle = tmp_path / "offline.trtb"
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
    }  # telemetry that asks for consent or keeps an id would write there
    for arguments in (
        ["compile", str(who.model.folder), "-o", str(bundle), "--backend", "openvino"],
        ["predict", str(bundle), "-i", str(who.model.images), "-o", str(tmp_path / "out")],
    ):
        subprocess.run([sys.executable, "-c", OFFLINE, *arguments], check=True, env=environment)
    assert not (tmp_path / "intel").exists()
