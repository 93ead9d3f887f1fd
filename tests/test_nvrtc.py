"""The kernels compiled for GPUs, without one: NVRTC, its errors, and the cache."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trtbuild.errors import EngineError, MissingExtra
from trtbuild.runtime import nvrtc as ours
from trtbuild.runtime.nvrtc import cubin_from_source, kernels_cubin, kernels_source
from trtbuild.stitch.launches import KERNELS
from trtbuild.stitch.preparation_launches import PREPARATION_KERNELS

ALL = (*KERNELS, *PREPARATION_KERNELS)

ELF, EM_CUDA = b"\x7fELF", 190
SMALL = 'extern "C" __global__ void fill(int *out) { out[threadIdx.x] = 1; }'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small source in the place of the kernels: compiling it takes 30 ms."""
    monkeypatch.setattr(ours, "kernels_source", lambda: SMALL)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_kernels_compile_to_machine_code(architecture: str) -> None:
    cubin = cubin_from_source(kernels_source(), architecture)
    assert cubin.startswith(ELF)
    assert int.from_bytes(cubin[18:20], "little") == EM_CUDA
    for name in ALL:
        assert f".text.{name}\0".encode() in cubin


def ptx() -> str:
    """The kernels for sm_80 as text, compiled with our options."""
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(kernels_source().encode(), b"kernels.cu", 0, [], [])
    options = [option.encode() for option in ("--gpu-architecture=compute_80", *ours.OPTIONS)]
    assert nvrtc.nvrtcCompileProgram(program, len(options), options)[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS
    text = bytearray(nvrtc.nvrtcGetPTXSize(program)[1])
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text.decode()


def test_no_product_is_fused_with_a_sum() -> None:
    """It would round once instead of twice, and not give the bits of the functions that define the kernels.

    exp, and the division by its sum, are made of fused operations and held to a tolerance.
    """
    entries = re.split(r"\.visible \.entry ", ptx())[1:]
    fused = {entry[: entry.index("(")] for entry in entries if "fma.rn.f32" in entry}
    assert {entry[: entry.index("(")] for entry in entries} == set(ALL)
    assert fused <= {name for name in KERNELS if name.startswith("probabilities")}
    assert not re.search(r"\b(mul|add|sub)\.f32", ptx())  # without .rn the assembler may fuse them


def test_a_faulty_source_gives_the_compilers_log() -> None:
    with pytest.raises(EngineError, match=r'kernels\.cu\(1\): error: identifier "nothing" is undefined'):
        cubin_from_source('extern "C" __global__ void f() { nothing(); }', "sm_80")


def test_a_gpu_that_the_compiler_does_not_know_is_named() -> None:
    with pytest.raises(EngineError, match="does not compile for this GPU") as caught:
        cubin_from_source(SMALL, "sm_70")
    assert caught.value.got == "sm_70"
    assert "sm_75" in str(caught.value.expected)


@pytest.mark.usefixtures("small")
def test_compiled_kernels_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kernels_cubin("8.6")
    (path,) = cache.iterdir()
    monkeypatch.setattr(ours, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert kernels_cubin("8.6") == first
    assert path.read_bytes().endswith(first)


@pytest.mark.usefixtures("small")
def test_another_source_gpu_option_or_compiler_is_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_cubin("8.6")
    assert kernels_cubin("12.0").startswith(ELF)
    monkeypatch.setattr(ours, "OPTIONS", (*ours.OPTIONS, "--extra-device-vectorization"))
    kernels_cubin("8.6")
    monkeypatch.setattr(ours, "kernels_source", lambda: SMALL + "\n")
    kernels_cubin("8.6")
    monkeypatch.setattr(ours, "_version", lambda nvrtc: "99.0")
    kernels_cubin("8.6")
    assert len(list(cache.iterdir())) == 5


@pytest.mark.usefixtures("small")
def test_the_folder_does_not_grow_without_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "LIMIT", 1)
    kernels_cubin("8.6")
    (old,) = cache.iterdir()
    kernels_cubin("9.0")
    (new,) = cache.iterdir()
    assert new != old


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_kernels_are_compiled_again(cache: Path, damage: str) -> None:
    first = kernels_cubin("8.6")
    (path,) = cache.iterdir()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes({"cut": raw[:-1], "flipped": raw, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match="cannot be used and are compiled again"):
        assert kernels_cubin("8.6") == first
    assert kernels_cubin("8.6") == first


@pytest.mark.usefixtures("small")
def test_without_a_cache_folder_the_kernels_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="Compiled kernels are not kept"):
        assert kernels_cubin("8.6").startswith(ELF)


@pytest.mark.usefixtures("small", "cache")
def test_a_failing_write_leaves_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ours.OutputError("A file cannot be written.", got="No space left on device")

    monkeypatch.setattr(ours, "write_kept", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert kernels_cubin("8.6").startswith(ELF)


@pytest.fixture
def no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.nvrtc"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_bindings")
def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'trtbuild\[gpu\]'"):
        kernels_cubin("8.6")


def test_a_missing_library_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so"')

    monkeypatch.setattr(ours, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=missing))
    with pytest.raises(EngineError, match="NVRTC cannot be loaded") as caught:
        kernels_cubin("8.6")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_failing_call_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def failing(*_: object) -> tuple[object, ...]:
        return nvrtc.nvrtcResult.NVRTC_ERROR_OUT_OF_MEMORY, 0

    monkeypatch.setattr(nvrtc, "nvrtcGetCUBINSize", failing)
    with pytest.raises(EngineError, match="NVRTC_ERROR_OUT_OF_MEMORY"):
        cubin_from_source(SMALL, "sm_80")
