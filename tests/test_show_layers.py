"""`inspect --layers`: what the command prints and writes of the kernels of a bundle's engines."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bundle_samples import CONTENTS, ENGINE, FILES

from trtbuild.bundle import write_bundle
from trtbuild.cli import run
from trtbuild.engine.tensorrt.table import layers_file, read_layers_file, table_from_log
from trtbuild.engine.tensorrt.values import EngineTable
from trtbuild.errors import BundleFileMissing, EngineError
from trtbuild.spec import BuildRecord, Memory
from trtbuild.steps.layers import bundle_layers

ROWS = json.loads((Path(__file__).parent / "data" / "tensorrt_rtx_layers.json").read_text())["messages"]
OPERATIONS = {"conv": 2 * 4 * 512 * 4 * 27, "up": 2 * 4 * 512 * 2 * 8}
INT8 = OPERATIONS["conv"] / sum(OPERATIONS.values())
NAME = "engines/fold_0_int8.tensorrt-rtx.layers.json"
CPU = CONTENTS.engines[1]


def recorded() -> EngineTable:
    table = table_from_log(ROWS)
    assert table is not None
    return table


def engine(name: str | int = NAME, **changes: Any) -> BuildRecord:
    record = replace(
        ENGINE, backend="tensorrt-rtx", flavour="tensorrt-rtx-1", version="1.7.1", inference_precision="f16",
        options={"layers": name}, memory=Memory(host=None, device_per_batch={"4": 123_456_789}, measured=False),
    )  # fmt: skip
    return replace(record, **changes)


def bundle(folder: Path, *engines: BuildRecord, content: bytes | None = None, **more: bytes) -> Path:
    """A bundle with these engines (one of TensorRT-RTX and one of OpenVINO) and the recorded layers."""
    layers = layers_file(recorded(), OPERATIONS) if content is None else content
    files = {**FILES, NAME: layers, **{f"engines/{name}.json": data for name, data in more.items()}}
    contents = replace(CONTENTS, engines=engines or (engine(), CPU))
    folder.mkdir(exist_ok=True)
    return write_bundle(folder / "sample.trtb", contents, files, overwrite=False).path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrapped."""
    monkeypatch.setenv("COLUMNS", "400")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["inspect", *words]) == 0
    return capsys.readouterr().out


def test_the_table_names_kernels_types_nodes_and_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, str(bundle(tmp_path)), "--layers")
    (row,) = (line for line in out.splitlines() if "correlation" in line)
    words = row.split()
    assert words[:5] == ["conv_myl0_2", "correlation", "Int8", "->", "Float"]
    assert "conv, x/DequantizeLinear + 1" in row
    assert words[-1] == f"{INT8:.1%}"
    (copy,) = (line for line in out.splitlines() if "__myl_Tran_" in line)
    assert "%" not in copy
    assert all(layer.name in out for layer in recorded().layers)


def test_the_summary_tells_coverage_memory_warnings_and_the_other_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, str(bundle(tmp_path)), "--layers")
    assert f"INT8 {INT8:.1%}, FP32 {1 - INT8:.1%}" in out
    assert "device memory: 123.5 MB at batch 4; weights " in out
    assert "warning: 1 quantised convolution writes Float" in out
    assert "warning: 1 ConvTranspose was not rewritten as convolution: up." in out
    assert "no layer table: fold_0_fp32 (openvino): a CPU backend has no such table; plain inspect shows" in out
    assert "fold_0_int8: tensorrt-rtx 1.7.1 in int8, rest f16" in out


def test_a_narrow_terminal_folds_names_and_cuts_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = shown(capsys, str(bundle(tmp_path)), "--layers").splitlines()
    width = next(line.index("kernel") for line in lines if "kernel" in line)
    assert width < 25 < max(len(layer.name) for layer in recorded().layers)
    column = "".join(line[:width].strip() for line in lines)
    assert all(layer.name in column for layer in recorded().layers)


def test_plain_inspect_shows_no_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle(tmp_path)
    assert "correlation" not in shown(capsys, str(path))
    assert "layers" not in json.loads(shown(capsys, str(path), "--json"))


def test_json_holds_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(shown(capsys, str(bundle(tmp_path)), "--layers", "--json"))
    assert facts["stages"]
    (found,) = facts["layers"]["engines"]
    assert found["coverage"]["precisions"] == {
        "int8": OPERATIONS["conv"],
        "fp16": 0,
        "bf16": 0,
        "fp32": OPERATIONS["up"],
    }
    assert found["coverage"]["unknown"] == []
    assert sum(layer["operations"] for layer in found["layers"]) == sum(OPERATIONS.values())
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    assert found["device_per_batch"] == {"4": 123_456_789}
    assert found["activation_memory"] == recorded().activation_memory
    table = {"layers": [{key: layer[key] for key in ("name", "kind", "tactic", "inputs", "outputs", "nodes")}
                        for layer in found["layers"]],
             "activation_memory": found["activation_memory"], "weights_memory": found["weights_memory"]}  # fmt: skip
    again = json.dumps({"format": 1, "operations": OPERATIONS, "table": table}).encode()
    assert read_layers_file(again).table == recorded()


class Page(HTMLParser):
    """A strict reader: every element is closed in its order, and nothing is loaded from elsewhere."""

    EMPTY = ("meta", "!doctype")
    LOADING = ("script", "link", "img", "iframe", "object", "embed", "base", "form")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.texts: list[str] = []
        self.widths: list[float] = []
        self.sections = 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in self.LOADING
        assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onload", "action"}
        style = dict(attrs).get("style") or ""
        if style.startswith("width"):
            self.widths.append(float(style.split()[1].rstrip("%;")))
        self.sections += tag == "section"
        if tag == "td":
            self.cells.append("")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.texts.append(data)
        if "td" in self.open:
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.texts)


def page_of(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Page:
    target = path.parent / "page.html"
    shown(capsys, str(path), "--html", str(target), *words)
    return Page(target.read_text(encoding="utf-8"))


def test_the_page_stands_alone_and_holds_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(bundle(tmp_path), capsys)
    layers = recorded().layers
    rows = [page.cells[start : start + 6] for start in range(0, len(page.cells), 6)]
    assert [row[1] for row in rows] == [layer.name for layer in layers]
    assert [row[2] for row in rows] == [layer.kind for layer in layers]
    assert rows[2][3:] == ["Int8 -> Float", "conv, x/DequantizeLinear, conv.weight/DequantizeLinear", f"{INT8:.1%}"]
    assert page.widths == [pytest.approx(100 * INT8, abs=0.06), pytest.approx(100 - 100 * INT8, abs=0.06)]
    assert "1 quantised convolution writes Float" in page.text
    assert "device memory: 123.5 MB at batch 4" in page.text
    assert "fold_0_fp32 (openvino)" in page.text


def test_each_engine_has_its_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = engine("engines/half.json", network="fold_0_fp32", precision="fp32", inference_precision="f32")
    unknown = layers_file(recorded(), {"conv": 3, "elsewhere": 1})
    path = bundle(tmp_path, engine(), half, half=unknown)
    page = page_of(path, capsys, "--layers")
    assert page.sections == 2
    assert "fold_0_fp32: tensorrt-rtx 1.7.1 in f32" in page.text
    assert "INT8 75.0%, unknown 25.0%; no kernel could be told of elsewhere" in page.text
    assert page.widths[2:] == [75.0, 25.0]


def test_names_of_a_bundle_are_shown_and_never_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>\x1b[31m\u202e[bold]&amp;\x00"
    first, *rest = recorded().layers
    layer = replace(first, name=evil, kind=evil, nodes=(evil, evil), outputs=(replace(rest[0].outputs[0], dtype=evil),))
    content = layers_file(replace(recorded(), layers=(layer, *rest)), {evil: 1, **OPERATIONS})
    path = bundle(tmp_path, content=content)
    page = page_of(path, capsys)
    assert sum(cell.startswith("<script>alert(1)</script>\\x1b[31m\\u202e[bold]&amp;\\x00") for cell in page.cells) == 3
    out = shown(capsys, str(path), "--layers")
    assert not {"\x1b", "\u202e", "\x00"} & set(out)
    assert "[bold]" in out


def test_a_bundle_of_cpu_engines_says_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle(tmp_path, CPU)
    target = tmp_path / "page.html"
    for words in (["--layers"], ["--html", str(target)], ["--layers", "--json"]):
        assert run(["inspect", str(path), *words]) == 1
        error = capsys.readouterr().err
        assert "No engine of this bundle has a layer table." in error
        assert "fold_0_fp32 (openvino): a CPU backend has no such table" in error
        assert f"trtbuild inspect {path}" in error
    assert not target.exists()


def test_a_tensorrt_engine_without_layers_is_named(tmp_path: Path) -> None:
    path = bundle(tmp_path, engine(), engine(network="fold_0_fp32", precision="fp32", options={}))
    assert bundle_layers(path)["without"] == ["fold_0_fp32 (tensorrt-rtx): TensorRT told no layers when it was built"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 50_000, b'{"format": 9}'])
def test_a_wrong_file_of_layers_is_named(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        bundle_layers(bundle(tmp_path, content=content))
    assert NAME in str(caught.value)


def test_a_record_must_name_a_file_of_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleFileMissing):
        bundle_layers(bundle(tmp_path / "a", engine("../elsewhere.json")))
    with pytest.raises(EngineError, match="does not name its file"):
        bundle_layers(bundle(tmp_path / "b", engine(3)))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="larger than any real one"):
        bundle_layers(bundle(tmp_path, content=b" " * (33 << 20)))


def test_without_jinja2_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    target = tmp_path / "page.html"
    assert run(["inspect", str(bundle(tmp_path)), "--html", str(target)]) == 1
    assert "pip install 'trtbuild[report]'" in capsys.readouterr().err
    assert not target.exists()


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundle(tmp_path)), "--html", str(tmp_path / "none" / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_no_operations_give_an_empty_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(bundle(tmp_path, content=layers_file(recorded(), {})), capsys)
    assert page.widths == []
    assert "0 billion operations per patch: none" in page.text
