"""`trtbuild doctor` on a machine with GPUs. The driver is a stand-in, compiled here, that answers as libcuda does."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import trtbuild.nvinfer
from trtbuild.cli import run
from trtbuild.errors import EngineError
from trtbuild.nvinfer import gpu_count, gpu_memory
from trtbuild.steps.doctor import health

LIBCUDA = r"""
#include <cstddef>
#include <cstdlib>
#include <cstring>
static int number(const char* name, int usual) { const char* v = getenv(name); return v ? atoi(v) : usual; }
extern "C" {
int cuInit(unsigned flags) { return number("STUB_INIT", 0); }
int cuDeviceGetCount(int* count) { *count = number("STUB_COUNT", 2); return 0; }
int cuDeviceGet(int* device, int index) { *device = 40 + index; return index < 2 ? 0 : 101; }
int cuDeviceGetName(char* name, int length, int device) {
    strncpy(name, device == 40 ? "First [bold] GPU" : "Second\033[2J GPU", length);
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? 8 : 6;
    return device == 41 ? number("STUB_SECOND", 0) : 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)(device == 40 ? 80 : 24) << 30; return 0; }
int cuDriverGetVersion(int* version) { *version = 13020; return 0; }
}
"""


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


def test_every_gpu_is_described(driver: None, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = health().gpus
    assert first == {"gpu": "First [bold] GPU", "capability": "8.6", "driver": "13.2", "memory": 80 << 30}
    assert second["memory"] == 24 << 30
    assert run(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "GPU 0: First [bold] GPU, 80.0 GiB, compute capability 8.6, driver for CUDA 13.2" in text
    assert "GPU 1: Second\\x1b[2J GPU, 24.0 GiB" in text, "a terminal would obey what stands in a name"
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"][0]["memory"] == 80 << 30


def test_one_gpu_that_fails_does_not_hide_the_others(
    driver: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STUB_SECOND", "201")
    first, second = health().gpus
    assert first["memory"] == 80 << 30
    assert "CUDA error 201" in str(second["error"])
    assert run(["doctor"]) == 0
    assert "CUDA error 201" in capsys.readouterr().out


def test_memory_of_a_gpu_that_is_not_there(driver: None) -> None:
    with pytest.raises(EngineError, match="does not describe") as caught:
        gpu_memory(2)
    assert (caught.value.got, caught.value.where) == ("CUDA error 101", "GPU 2")


@pytest.mark.parametrize("setting", [("STUB_COUNT", "0"), ("STUB_INIT", "100")])
def test_a_driver_without_a_gpu_has_none(
    driver: None, monkeypatch: pytest.MonkeyPatch, setting: tuple[str, str]
) -> None:
    monkeypatch.setenv(*setting)
    assert gpu_count() == 0
    assert health().gpus == ()


def test_without_a_driver_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtbuild.nvinfer, "DRIVER", str(tmp_path / "libcuda.so.1"))
    assert health().gpus == ()
    with pytest.raises(EngineError):
        gpu_memory(0)
