"""The tile loop and one whole case through the null runner: no hardware, answers known in closed form."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from specs import make_spec, spline

from trtbuild.errors import Cancelled, NonFinite
from trtbuild.runtime import Settings, logits_from_image, prediction_from_array, tile_plan
from trtbuild.runtime.null import NullRunner, null_info, null_logits
from trtbuild.runtime.runner import Batch
from trtbuild.spec import BuildRecord, Memory, ModelSpec, NoNormalization, Profile


def record(spec: ModelSpec, *, batch: int = 1, streams: int = 1) -> BuildRecord:
    def shape(n: int) -> tuple[int, ...]:
        return (n, spec.network_channels, *spec.patch)

    return BuildRecord(
        network="fold_0_fp32", backend="null", flavour="null", version="0", file=None, precision="fp32",
        inference_precision="f32", profile=Profile(min=shape(1), opt=shape(batch), max=shape(batch)), device={},
        options={"threads": 1, "streams": streams, "batch": batch, "heads": spec.labels.heads},
        memory=Memory(host=None, device_per_batch={}, measured=False),
    )  # fmt: skip


def null_runner(spec: ModelSpec, *, batch: int = 1, kind: type[NullRunner] = NullRunner) -> NullRunner:
    return kind(null_info(record(spec, batch=batch)))


def image(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 2.4, size=shape).astype(np.float32)


SPECS = {
    "3D": make_spec(normalization=(NoNormalization(),)),
    "2D": make_spec(normalization=(NoNormalization(),), patch=(8, 12), spacing=(1.0, 1.0), configuration="2d"),
}


@pytest.mark.parametrize("dimensions", SPECS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [(1, 19, 26, 23), (1, 8, 12, 10), (1, 3, 5, 31)])
def test_a_voxelwise_network_gives_its_own_answer_whatever_the_windows(
    dimensions: str, batch: int, shape: tuple[int, ...]
) -> None:
    spec, data = SPECS[dimensions], image(shape)
    axes = (0, 1, 2) if dimensions == "3D" else (0, 1)
    with null_runner(spec, batch=batch) as runner:
        seen: list[tuple[int, int]] = []
        logits = logits_from_image(
            data, spec, [runner, runner], axes, 0.5, lambda done, total: seen.append((done, total))
        )
        plan = tile_plan(shape[1:], spec, axes, 0.5)
        assert runner.patches == 2 * len(plan)
    np.testing.assert_allclose(logits, null_logits(data[None], 3)[0], atol=2e-5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (2 * len(plan), 2 * len(plan))


def test_a_whole_case_ends_on_the_images_grid_with_the_nearest_label() -> None:
    spec = replace(SPECS["3D"], transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0), resample_data=spline(1))
    data = np.zeros((1, 20, 22, 24), dtype=np.float32)
    data[0, 3:18, 2:20, 5:21] = 2
    data[0, 8:14, 8:14, 8:14] = 1
    with null_runner(spec) as runner:
        result = prediction_from_array(data, (1, 1, 1), spec, [runner], (0,), Settings())
    np.testing.assert_array_equal(result.segmentation, data[0].astype(np.uint8))
    assert set(result.seconds) == {"prepare", "network", "back"}


class Spoiling(NullRunner):
    """Answers NaN in the seventh patch."""

    def answer(self, batch: Batch) -> Batch:
        result = super().answer(batch).copy()
        if self.patches == 7:
            result[0, 1, 2, 3, 4] = np.nan
        return result


def test_a_nan_stops_the_case_and_names_engine_and_window() -> None:
    spec = SPECS["3D"]
    with null_runner(spec, kind=Spoiling) as runner, pytest.raises(NonFinite) as caught:
        logits_from_image(image((1, 19, 26, 23)), spec, [runner], (), 0.5, lambda done, total: None)
    seventh = list(tile_plan((19, 26, 23), spec, (), 0.5))[6]
    assert "null" in str(caught.value)
    assert str(seventh.start) in str(caught.value)


@pytest.mark.parametrize("stage", ["prepare", "network", "back"])
def test_a_callback_that_says_no_stops_the_case(stage: str) -> None:
    spec, stages = SPECS["3D"], []

    def progress(now: str, done: int, total: int) -> bool:
        stages.append(now)
        return now != stage

    with null_runner(spec) as runner, pytest.raises(Cancelled, match=stage):
        prediction_from_array(image((1, 19, 26, 23)), (1, 1, 1), spec, [runner], (), Settings(), progress)
    assert stages[-1] == stage


def test_an_empty_image_is_predicted_with_a_warning() -> None:
    spec = SPECS["3D"]
    with null_runner(spec) as runner:
        result = prediction_from_array(np.zeros((1, 9, 13, 11), np.float32), (1, 1, 1), spec, [runner], (), Settings())
    assert not result.segmentation.any()
    assert result.warnings


def test_more_folds_and_flips_cost_exactly_that_many_passes() -> None:
    spec = SPECS["3D"]
    with ExitStack() as stack:
        runners = [stack.enter_context(null_runner(spec)) for _ in range(3)]
        logits_from_image(image((1, 16, 12, 10)), spec, runners, (0, 2), 0.5, lambda done, total: None)
        assert [r.patches for r in runners] == [3 * 4] * 3


def test_a_missing_model_file_is_an_engine_error(tmp_path: Path) -> None:
    from trtbuild.errors import EngineError
    from trtbuild.runtime.select import open_runner

    broken = replace(record(SPECS["3D"]), backend="openvino")
    with pytest.raises(EngineError):
        open_runner(broken, tmp_path / "nothing.onnx")
