"""The door to TensorRT: what an installation that is broken is called, and what a driver says of its GPU.

The driver is a stand-in, compiled here, that answers as libcuda does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trtbuild.nvinfer
from trtbuild.errors import EngineError, MissingExtra
from trtbuild.nvinfer import gpu_description, no_driver, nvinfer

LIBCUDA = r"""
#include <cstdlib>
#include <cstring>
static int number(const char* name, int usual) { const char* v = getenv(name); return v ? atoi(v) : usual; }
extern "C" {
int cuInit(unsigned flags) { return flags == 0 ? number("STUB_INIT", 0) : 1; }
int cuDeviceGetCount(int* count) { *count = number("STUB_COUNT", 2); return 0; }
int cuDeviceGet(int* device, int index) { *device = 40 + index; return index < 2 ? 0 : 101; }
int cuDeviceGetName(char* name, int length, int device) {
    strncpy(name, device == 40 ? "First GPU" : "Second GPU", length);
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? (device == 40 ? 8 : 12) : attribute == 76 ? (device == 40 ? 6 : 1) : -1;
    return number("STUB_ATTRIBUTE", 0);
}
int cuDriverGetVersion(int* version) { *version = 13020; return 0; }
}
"""
"""75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.fail("g++ is needed for a stand-in of the driver; install it (Debian: apt-get install g++).")
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "cuda.cpp").write_text(LIBCUDA)
    command = [compiler, "-shared", "-fPIC", "-Wall", "-o", "libcuda.so.1", "cuda.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "libcuda.so.1"


@pytest.fixture
def driver(libcuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtbuild.nvinfer, "DRIVER", str(libcuda))


# the driver


def test_a_gpu_is_described_as_its_driver_says(driver: None) -> None:
    assert no_driver() is None
    assert gpu_description() == {"gpu": "First GPU", "capability": "8.6", "driver": "13.2"}
    assert gpu_description(1) == {"gpu": "Second GPU", "capability": "12.1", "driver": "13.2"}


def test_a_driver_without_a_gpu_is_none(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_COUNT", "0")
    assert no_driver() == "no NVIDIA GPU"
    with pytest.raises(EngineError, match="There is no GPU here") as caught:
        gpu_description()
    assert caught.value.got == "no NVIDIA GPU"
    assert "tensorrt-rtx" in str(caught.value.hint)


def test_a_driver_that_fails_is_told_with_its_number(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="does not describe") as caught:
        gpu_description(2)
    assert (caught.value.got, caught.value.where) == ("CUDA error 101", "GPU 2")
    monkeypatch.setenv("STUB_ATTRIBUTE", "201")
    with pytest.raises(EngineError, match="CUDA error 201"):
        gpu_description()
    monkeypatch.setenv("STUB_INIT", "803")
    assert no_driver() == "no NVIDIA GPU that its driver can use (CUDA error 803)"


def test_without_a_driver_the_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtbuild.nvinfer, "DRIVER", str(tmp_path / "libcuda.so.1"))
    assert str(tmp_path) in str(no_driver())
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        gpu_description()


# the package


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in front of the installed packages; no flavour is loaded, and what the test loads goes again."""
    for name in _loaded():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in _loaded():
        del sys.modules[name]


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in ("tensorrt", "tensorrt_rtx")]


def test_what_is_not_installed_is_told_with_its_extra(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(packages)])
    with pytest.raises(MissingExtra, match=r"trtbuild\[rtx\]"):
        nvinfer("tensorrt-rtx")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import tensorrt_lost_libraries", "tensorrt_lost_libraries"),  # a part of it was removed
        ("from .tensorrt import *", "tensorrt.tensorrt"),
        ("raise OSError('libnvinfer.so.10: cannot open shared object file')", "libnvinfer.so.10"),
        ("raise ImportError('undefined symbol: x')", "undefined symbol"),
        ("", "no version"),
        ("__version__ = 10", "no version"),
    ],
)
def test_a_broken_installation_is_not_called_missing(content: str, words: str, packages: Path) -> None:
    (packages / "tensorrt").mkdir()
    (packages / "tensorrt" / "__init__.py").write_text(content)
    with pytest.raises(EngineError, match="cannot be loaded") as caught:
        nvinfer("tensorrt")
    assert not isinstance(caught.value, MissingExtra)
    assert words in str(caught.value.got)
    assert caught.value.hint == "pip install --force-reinstall 'trtbuild[tensorrt]'"


def test_a_folder_of_the_same_name_is_no_tensorrt(packages: Path) -> None:
    """Python imports any folder on its path; the other flavour must not take that for TensorRT."""
    (packages / "tensorrt").mkdir()
    with pytest.raises(EngineError, match="cannot be loaded") as caught:
        nvinfer("tensorrt")
    assert str(packages) in str(caught.value.got)
    (packages / "tensorrt_rtx.py").write_text("__version__ = '1.7.1'")
    assert nvinfer("tensorrt-rtx").flavour == "tensorrt-rtx-1"
    with pytest.raises(EngineError, match="cannot be in one process"):
        nvinfer("tensorrt")
