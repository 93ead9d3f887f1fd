"""trtbuild.graph: the contract of passes, files that are no good, and the table."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_samples import assert_same_results, floats, model_of, node, operators, run
from onnx import TensorProto, helper, numpy_helper

from trtbuild.errors import GraphError, MissingExtra, OutputError
from trtbuild.graph import (
    Pass,
    TableRow,
    check_model,
    clean,
    clean_passes,
    io_from_model,
    load_onnx,
    model_from_bytes,
    op_counts,
    opset_from_model,
    run_passes,
    save_onnx,
    table_from_clean,
)
from trtbuild.graph.fold_identities import FOLD_IDENTITIES
from trtbuild.graph.rewrite_conv_transpose import REWRITE_CONV_TRANSPOSE
from trtbuild.graph.stable_names import STABLE_NAMES
from trtbuild.spec import TensorSpec, json_from_value


def untidy() -> onnx.ModelProto:
    """Something for every pass: Identity, Constant, Shape, twins, dead node, ConvTranspose, foreign names."""
    return model_of(
        [
            node("Constant", "", "two", "constant", value_float=2.0),
            node("Identity", "twin", "bias", "identity"),
            node("Conv", "x w bias", "a", "conv", pads=[1, 1, 1, 1]),
            node("Mul", "a two", "b", "scale"),
            node("Relu", "b", "c", "dead"),
            node("Shape", "b", "s", "shape", start=2),
            node("Concat", "head s", "t", "target", axis=0),
            node("Reshape", "b t", "d", "reshape"),
            node("ConvTranspose", "d u other", "y", "up", strides=[2, 2]),
        ],
        {"x": ["n", 1, 4, 6]},
        {"y": ["n", 2, 8, 12]},
        {
            "w": floats(2, 1, 3, 3),
            "twin": np.array([1, 2], np.float32),
            "other": np.array([1, 2], np.float32),
            "head": np.array([0, 2], np.int64),
            "u": floats(2, 2, 2, 2, seed=1),
            "unread": floats(5),
        },
    )


def broken(**changes: object) -> Pass:
    """A pass that does nothing, with some of its parts replaced."""
    fine = Pass(name="mine", requires=lambda m: (), apply=lambda m: (m, ()), ensures=lambda m: ())
    return dataclasses.replace(fine, **changes)


def renamed_output(model: onnx.ModelProto, new: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.node[-1].output[0] = new
    return result, ()


def without_output(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.output.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, ["n", 2, 4, 6]))
    return result, ()


def fails(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    raise KeyError("w")


class TestContracts:
    def test_the_given_model_is_never_changed(self) -> None:
        model = untidy()
        before = model.SerializeToString(deterministic=True)
        clean(model, rewrite_conv_transpose=True, split_instance_norm=False)
        assert model.SerializeToString(deterministic=True) == before

    @pytest.mark.parametrize("rewrite", [False, True])
    def test_every_pass_of_a_second_cleaning_finds_nothing_and_the_bytes_stay(self, rewrite: bool) -> None:
        once = clean(untidy(), rewrite_conv_transpose=rewrite, split_instance_norm=False)
        twice = clean(once.model, rewrite_conv_transpose=rewrite, split_instance_norm=False)
        assert [report.name for report in once.reports if report.modified]
        assert [report.name for report in twice.reports if report.modified] == []
        assert twice.model.SerializeToString() == once.model.SerializeToString()

    @pytest.mark.parametrize("rewrite", [False, True])
    def test_every_pass_alone_is_idempotent(self, rewrite: bool) -> None:
        model = untidy()
        for step in clean_passes(rewrite_conv_transpose=rewrite, split_instance_norm=False):
            model = run_passes(model, [step]).model
            (again,) = run_passes(model, [step]).reports
            assert not again.modified, step.name
            assert (again.removed, again.added, again.changed) == ((), (), ())

    @pytest.mark.parametrize("rewrite", [False, True])
    def test_cleaning_keeps_the_results(self, rewrite: bool) -> None:
        model = untidy()
        assert_same_results(
            model,
            clean(model, rewrite_conv_transpose=rewrite, split_instance_norm=False).model,
            floats(3, 1, 4, 6, seed=2),
        )

    def test_a_second_run_gives_the_same_bytes(self) -> None:
        first, second = (
            clean(untidy(), rewrite_conv_transpose=True, split_instance_norm=False).model for _ in range(2)
        )
        assert first.SerializeToString() == second.SerializeToString()

    def test_a_requirement_that_does_not_hold_names_the_pass_and_those_before_it(self) -> None:
        with pytest.raises(GraphError, match="needy cannot start") as caught:
            run_passes(untidy(), [broken(), broken(name="needy", requires=lambda m: ("a is missing",))])
        assert "a is missing" in str(caught.value)
        assert "after mine" in str(caught.value)

    def test_a_broken_ensures_names_the_pass_and_its_problems(self) -> None:
        many = tuple(f"problem {number}" for number in range(9))
        with pytest.raises(GraphError, match="The pass mine broke its contract") as caught:
            run_passes(untidy(), [broken(ensures=lambda m: many)])
        assert "problem 0" in str(caught.value)
        assert "and 4 more" in str(caught.value)

    def test_a_pass_that_raises_is_named_and_the_cause_is_kept(self) -> None:
        with pytest.raises(GraphError, match="The pass mine failed") as caught:
            run_passes(untidy(), [broken(apply=fails)])
        assert isinstance(caught.value.__cause__, KeyError)

    @pytest.mark.parametrize(
        ("apply", "problem"),
        [
            (lambda m: renamed_output(m, "lost"), "nothing makes the output y"),
            (lambda m: renamed_output(m, "a"), "up makes a, which was there already"),
            (without_output, "inputs and outputs were"),
        ],
    )
    def test_a_pass_that_tears_the_graph_is_caught_whatever_it_ensures(self, apply: object, problem: str) -> None:
        with pytest.raises(GraphError, match="mine broke its contract") as caught:
            run_passes(untidy(), [broken(apply=apply)])
        assert problem in str(caught.value)

    def test_the_real_passes_state_what_they_need(self) -> None:
        with pytest.raises(GraphError, match="stable_names cannot start") as caught:
            run_passes(untidy(), [STABLE_NAMES])
        assert "dead leads to no output" in str(caught.value)
        with pytest.raises(GraphError, match="fold_identities cannot start") as caught:
            run_passes(untidy(), [FOLD_IDENTITIES])
        assert "nobody reads the initializer unread" in str(caught.value)
        model = untidy()
        model.graph.initializer.pop()
        with pytest.raises(GraphError, match="rewrite_conv_transpose cannot start") as caught:
            run_passes(model, [REWRITE_CONV_TRANSPOSE])
        assert "d has no shape" in str(caught.value)

    def test_reports_count_nodes_and_initializers(self) -> None:
        reports = clean(untidy(), rewrite_conv_transpose=False, split_instance_norm=False).reports
        first = reports[0]
        assert (first.name, first.nodes_before, first.nodes_after) == ("drop_dead", 9, 8)
        assert (first.initializers_before, first.initializers_after) == (6, 5)
        assert first.removed == ("dead",)
        assert [r.name for r in reports] == [
            step.name for step in clean_passes(rewrite_conv_transpose=False, split_instance_norm=False)
        ]
        assert all(a.nodes_after == b.nodes_before for a, b in itertools.pairwise(reports))


def scrambled(seed: int) -> onnx.ModelProto:
    """A random graph of everything that the passes look for, over tensors (n, 4)."""
    random = np.random.default_rng(seed)
    tensors = ["x"]
    weights = {f"w{i}": floats(4, seed=int(random.integers(3))) for i in range(4)}
    nodes = []
    for i in range(30):
        kind = random.choice(["Add", "Mul", "Relu", "Identity", "Constant", "Neg", "IdentityOfWeight", "Unary"])
        pick = [str(random.choice(tensors)) for _ in range(2)]
        weight = str(random.choice(list(weights)))
        out = f"t{i}"
        if kind == "Constant":
            value = numpy_helper.from_array(floats(4, seed=int(random.integers(3))))
            nodes.append(node("Constant", "", out, f"n{i}", value=value))
        elif kind == "IdentityOfWeight":
            nodes.append(node("Identity", weight, out, f"n{i}"))
        elif kind == "Unary":
            nodes.append(node("Abs", weight, out, f"n{i}"))
        elif kind in ("Add", "Mul"):
            nodes.append(node(str(kind), f"{pick[0]} {random.choice([pick[1], weight])}", out, f"n{i}"))
        else:
            nodes.append(node(str(kind), pick[0], out, f"n{i}"))
        tensors.append(out)
    nodes.append(node("Add", f"x {tensors[-1]}", "y", "last"))
    outputs = {"y": ["n", 4], **({"t7": [None, 4]} if seed % 2 else {})}
    model = model_of(nodes, {"x": ["n", 4]}, dict.fromkeys(outputs), weights)
    inferred = onnx.shape_inference.infer_shapes(model)
    del model.graph.output[:]
    model.graph.output.extend(inferred.graph.output)
    return model


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs_keep_their_results_and_cleaning_them_again_changes_nothing(seed: int) -> None:
    model = scrambled(seed)
    result = clean(model, rewrite_conv_transpose=True, split_instance_norm=False).model
    assert_same_results(model, result, floats(3, 4, seed=seed))
    assert len(result.graph.node) <= len(model.graph.node)
    assert "Constant" not in operators(result)
    assert (
        clean(result, rewrite_conv_transpose=True, split_instance_norm=False).model.SerializeToString()
        == result.SerializeToString()
    )


class TestFiles:
    def test_a_saved_model_is_read_back_equal_and_nothing_else_is_left(self, tmp_path: Path) -> None:
        save_onnx(untidy(), tmp_path / "a.onnx")
        assert load_onnx(tmp_path / "a.onnx") == untidy()
        assert os.listdir(tmp_path) == ["a.onnx"]

    def test_a_failed_write_leaves_the_old_file_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.onnx").write_bytes(b"old")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            save_onnx(untidy(), tmp_path / "a.onnx")
        assert str(tmp_path / "a.onnx") in str(caught.value)
        assert (tmp_path / "a.onnx").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a.onnx"]

    def test_a_missing_folder_is_an_output_error(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="cannot be written"):
            save_onnx(untidy(), tmp_path / "no" / "a.onnx")

    @pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b'{"a": 1}', b"\xff" * 64, bytes(64)])
    def test_what_is_no_onnx_file_is_refused_with_its_path(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.onnx").write_bytes(content)
        with pytest.raises(GraphError, match="no ONNX model") as caught:
            load_onnx(tmp_path / "a.onnx")
        assert str(tmp_path / "a.onnx") in str(caught.value)
        assert "next" in str(caught.value)

    def test_a_missing_file_and_a_folder_are_refused(self, tmp_path: Path) -> None:
        for path in (tmp_path / "a.onnx", tmp_path):
            with pytest.raises(GraphError, match="cannot be read") as caught:
                load_onnx(path)
            assert str(path) in str(caught.value)

    def test_every_truncation_is_refused(self) -> None:
        content = untidy().SerializeToString()
        for length in range(0, len(content), 7):
            with pytest.raises(GraphError):
                model_from_bytes(content[:length])

    def test_flipped_bits_give_a_model_or_a_graph_error_never_anything_else(self) -> None:
        content = untidy().SerializeToString()
        random = np.random.default_rng(0)
        refused = 0
        for _ in range(300):
            flipped = bytearray(content)
            flipped[random.integers(len(flipped))] ^= 1 << int(random.integers(8))
            try:
                clean(model_from_bytes(bytes(flipped)), rewrite_conv_transpose=True, split_instance_norm=False)
            except GraphError:
                refused += 1
        assert 30 < refused < 300


def changed(change: str) -> onnx.ModelProto:
    """`untidy` with one thing wrong."""
    model = untidy()
    graph, weight = model.graph, model.graph.initializer[0]
    if change == "external":
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="weights.bin")
    elif change == "short":
        weight.raw_data = weight.raw_data[:-4]
    elif change == "long":
        weight.raw_data = weight.raw_data + bytes(4)
    elif change == "type":
        weight.data_type = 99
    elif change == "huge":
        weight.dims[0] = 2**62
    elif change == "negative":
        weight.dims[0] = -2
    elif change == "unconnected":
        graph.node[3].input[0] = "nowhere"
    elif change == "loop":
        graph.node[2].input[0] = "d"
    elif change == "twice":
        graph.node[4].output[0] = "b"
    elif change == "operator":
        graph.node[3].op_type = "Mull"
    elif change == "shape":
        del graph.input[0].type.tensor_type.shape.dim[3]
    elif change == "opset":
        model.opset_import[0].version = 999
    elif change == "no opset":
        del model.opset_import[:]
    elif change == "training":
        model.training_info.add()
    elif change == "function":
        body = [node("Relu", "a", "b", "r")]
        model.functions.append(helper.make_function("mine", "f", ["a"], ["b"], body, [helper.make_opsetid("", 20)]))
    elif change == "sparse":
        values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
        graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [4])
        )
    return model


class TestMalformed:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ("external", "tensor w"),
            ("short", "68 bytes"),
            ("long", "76 bytes"),
            ("type", "99"),
            ("huge", "tensor w"),
            ("negative", "tensor w"),
            ("unconnected", "nowhere"),
            ("loop", "conv"),
            ("twice", "b"),
            ("operator", "Mull"),
            ("shape", "conv"),
            ("opset", "999"),
            ("no opset", "opset"),
            ("training", "training_info"),
            ("function", "local function f"),
            ("sparse", "sparse initializer sparse"),
        ],
    )
    def test_each_is_a_graph_error_that_names_place_and_part(self, change: str, named: str) -> None:
        with pytest.raises(GraphError) as caught:
            check_model(changed(change), where="net.onnx")
        assert named in str(caught.value)
        assert "net.onnx" in str(caught.value)
        with pytest.raises(GraphError):
            clean(changed(change), rewrite_conv_transpose=True, split_instance_norm=False)

    def test_control_flow_is_refused_and_named(self) -> None:
        branch = helper.make_graph(
            [node("Relu", "x", "r", "inner")], "branch", [], [helper.make_tensor_value_info("r", 1, ["n", 4])]
        )
        model = model_of(
            [node("If", "flag", "y", "choice", then_branch=branch, else_branch=branch)],
            {"x": ["n", 4]},
            {"y": ["n", 4]},
            {"flag": np.array(True)},
        )
        run(model, floats(2, 4))  # ONNX Runtime takes it: it is a sound model
        with pytest.raises(GraphError, match="cannot be cleaned") as caught:
            clean(model, rewrite_conv_transpose=False, split_instance_norm=False)
        assert "If node choice with then_branch (GRAPH)" in str(caught.value)

    def test_another_object_is_refused(self) -> None:
        for other in (None, b"", onnx.GraphProto(), onnx.ModelProto()):
            with pytest.raises(GraphError, match="no ONNX model"):
                check_model(other)

    def test_a_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
        with pytest.raises(MissingExtra, match=r"pip install 'trtbuild\[graph\]'"):
            clean(untidy(), rewrite_conv_transpose=False, split_instance_norm=False)


def test_operators_outside_the_standard_are_carried_along() -> None:
    model = model_of(
        [
            node("Identity", "x", "a", "identity"),
            node("Mine", "a", "b", "own", domain="my.domain", strength=0.5),
            node("Relu", "b", "y", "relu"),
        ],
        {"x": ["n", 4]},
        {"y": ["n", 4]},
        domains=["my.domain"],
    )
    result = clean(model, rewrite_conv_transpose=True, split_instance_norm=False)
    assert operators(result.model) == ["Mine", "Relu"]
    own = result.model.graph.node[0]
    assert (own.domain, list(own.input), own.attribute[0].f) == ("my.domain", ["image"], 0.5)
    assert op_counts(result.model) == {"Relu": 1, "my.domain::Mine": 1}


def test_importing_the_room_loads_neither_onnx_nor_graphsurgeon() -> None:
    heavy = ("onnx", "onnx_graphsurgeon", "onnxruntime")
    code = f"import sys, trtbuild.graph; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cleaning_prints_nothing() -> None:
    """graphsurgeon warns about every BF16 tensor; a fresh process, because it warns once."""
    code = """
from graph_samples import model_of, node
from onnx import TensorProto
from trtbuild.graph import clean
weight = TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[4], raw_data=bytes(8))
nodes = [node("Identity", "x", "a", "i"), node("Add", "a w", "y", "add")]
model = model_of(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, {"w": weight}, dtype=TensorProto.BFLOAT16)
assert len(clean(model, rewrite_conv_transpose=True, split_instance_norm=False).model.graph.node) == 1
"""
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": folders})
    assert (done.stdout, done.stderr) == ("", "")


def test_the_table_counts_operators_nodes_initializers_and_bytes() -> None:
    model = untidy()
    result = clean(model, rewrite_conv_transpose=True, split_instance_norm=False)
    rows = {row.what: (row.before, row.after) for row in table_from_clean(model, result)}
    assert rows["Identity"] == (1, 0)
    assert rows["ConvTranspose"] == (1, 0)
    assert rows["Conv"] == (1, 2)
    assert rows["Transpose"] == (0, 1)
    assert rows["nodes"] == (9, len(result.model.graph.node))
    assert rows["initializers"] == (6, len(result.model.graph.initializer))
    assert rows["bytes"] == (len(model.SerializeToString()), len(result.model.SerializeToString()))
    assert list(rows)[-3:] == ["nodes", "initializers", "bytes"]
    assert json_from_value(TableRow(what="Conv", before=1, after=2)) == {"what": "Conv", "before": 1, "after": 2}


def test_inputs_outputs_and_opset_of_a_model_are_told() -> None:
    model = clean(untidy(), rewrite_conv_transpose=False, split_instance_norm=False).model
    assert opset_from_model(model) == 20
    assert io_from_model(model) == (
        TensorSpec(name="image", dtype="float32", shape=("batch", 1, 4, 6)),
        TensorSpec(name="logits", dtype="float32", shape=("batch", 2, 8, 12)),
    )
