"""Ensembles: nnU-Net's own average is the reference; votes and the entropy map are checked in closed form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import subject
from nnunetv2.ensembling.ensemble import average_probabilities
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from reference import geometry_differences, quiet, segmentation_from_file
from specs import make_spec

import trtbuild
from trtbuild.config import PredictConfig
from trtbuild.errors import ModelError, TrtbuildError
from trtbuild.runtime.ensemble import consensus_from_votes, decided, entropy_of_probabilities
from trtbuild.steps.folder_run.cases import predict_cases

MEMBERS = ("ens2d", "ens3d")


def nnunet_average(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """nnU-Net's `ensemble_folders` for one case: mean probabilities and labels, as arrays (Z, Y, X)."""
    files = [subject(name).reference(kind) for name in MEMBERS]
    mean = average_probabilities([str(f).replace(".nii.gz", ".npz") for f in files])
    folder = subject(MEMBERS[0]).model.folder
    with quiet():
        manager = PlansManager(str(folder / "plans.json")).get_label_manager(
            json.loads((folder / "dataset.json").read_text())
        )
        labels = manager.convert_probabilities_to_segmentation(mean)
    return mean, np.asarray(labels)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["main", "small", "zero"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_average_of_2d_and_3d_equals_nnunets(kind: str, backend: str, tmp_path: Path) -> None:
    mean, labels = nnunet_average(kind)
    config = PredictConfig(
        bundles=tuple(subject(name).bundle for name in MEMBERS),
        inputs=subject(MEMBERS[0]).model.cases[kind],
        output=tmp_path,
        backend=backend,
        save_probabilities=True,
        disagreement=True,
    )
    outcome = predict_cases(config).outcomes[0]
    assert outcome.error is None, outcome.error
    written = Path(str(outcome.output))
    ours = segmentation_from_file(written).transpose(2, 1, 0)
    limit = {"onnxruntime": (2, 2e-5, 1e-4), "openvino": (3, 5e-5, 1e-3)}[backend]
    assert np.count_nonzero(ours != labels) <= max(limit[0], limit[1] * labels.size)
    assert geometry_differences(written, subject(MEMBERS[0]).reference(kind)) == []
    probabilities = np.load(tmp_path / written.name.replace(".nii.gz", ".npz"))["probabilities"]
    np.testing.assert_allclose(probabilities, mean, atol=limit[2], rtol=0)
    wide = mean.astype(np.float64)
    entropy = -(wide * np.log(np.maximum(wide, 1e-30))).sum(axis=0) / np.log(len(wide))
    there = segmentation_from_file(tmp_path / "disagreement" / written.name).transpose(2, 1, 0)
    assert there.dtype == np.float32
    np.testing.assert_allclose(there, entropy, atol=20 * limit[2])


@pytest.mark.parity
def test_weights_weigh_the_members(tmp_path: Path) -> None:
    paths = [subject(name).bundle for name in MEMBERS]
    files = subject(MEMBERS[0]).model.cases["main"]
    single = []
    for path in paths:
        with trtbuild.open(path, backend="onnxruntime") as predictor:
            single.append(predictor.predict(files, probabilities=True).probabilities)
    with trtbuild.open(paths, backend="onnxruntime", weights=(3, 1)) as predictor:
        both = predictor.predict(files, probabilities=True)
    assert both.probabilities is not None
    expected = (3 * np.asarray(single[0], np.float64) + np.asarray(single[1], np.float64)) / 4
    np.testing.assert_allclose(both.probabilities, expected, atol=1e-6)
    np.testing.assert_array_equal(both.segmentation, both.probabilities.argmax(axis=0))


@pytest.mark.parity
def test_a_hard_vote_counts_labels(tmp_path: Path) -> None:
    paths = [subject(name).bundle for name in MEMBERS]
    files = subject(MEMBERS[0]).model.cases["main"]
    single = []
    for path in paths:
        with trtbuild.open(path, backend="onnxruntime") as predictor:
            single.append(predictor.predict(files).segmentation)
    with trtbuild.open(paths, backend="onnxruntime", vote="hard", weights=(1, 1.5)) as predictor:
        np.testing.assert_array_equal(predictor.predict(files).segmentation, single[1])


def test_votes_of_three_and_their_entropy() -> None:
    labels = make_spec().labels
    votes = [np.array([[[a, b, c]]], np.uint8) for a, b, c in ((0, 1, 2), (0, 1, 1), (0, 2, 0))]
    result = consensus_from_votes(votes, labels, (1, 1, 1), disagreement=True)
    assert result.segmentation.ravel().tolist() == [0, 1, 0]  # a tie takes the first in the order of the labels
    assert result.segmentation.dtype == np.uint8
    third = np.array([1 / 3])
    expected = [0, -(2 / 3) * np.log(2 / 3) - third[0] * np.log(third[0]), -3 * third[0] * np.log(third[0])]
    assert result.disagreement is not None
    np.testing.assert_allclose(result.disagreement.ravel(), np.array(expected) / np.log(3), atol=1e-6)
    heavier = consensus_from_votes(votes, labels, (1, 1, 3), disagreement=False)
    assert heavier.segmentation.ravel().tolist() == [0, 2, 0]


def test_regions_are_decided_above_one_half_later_over_earlier() -> None:
    labels = replace(make_spec().labels, decision="regions", values=(2, 1))
    probabilities = np.array([[0.6, 0.5, 0.9], [0.4, 0.5, 0.7]], np.float32)
    assert decided(probabilities, labels).tolist() == [2, 0, 1]
    entropy = entropy_of_probabilities(probabilities, labels)
    p = probabilities.astype(np.float64)
    expected = (-p * np.log(p) - (1 - p) * np.log(1 - p)).mean(axis=0) / np.log(2)
    np.testing.assert_allclose(entropy, expected, atol=1e-6)


def test_certain_probabilities_disagree_by_nothing_and_equal_ones_by_one() -> None:
    labels = make_spec().labels
    probabilities = np.array([[1, 1 / 3], [0, 1 / 3], [0, 1 / 3]], np.float32)
    np.testing.assert_allclose(entropy_of_probabilities(probabilities, labels), [0, 1], atol=1e-6)


def test_models_of_other_labels_or_channels_are_no_ensemble() -> None:
    with pytest.raises(ModelError, match="channels"):
        trtbuild.open([subject("ens3d").bundle, subject("ct_aniso").bundle])


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": (1,)}, {"weights": (1, 0)}, {"weights": (1, float("nan"))}, {"weights": (1e308, 1e308)},
        {"weights": "12"}, {"weights": (1, "2")},
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrtbuildError, match="weights"):
        trtbuild.open([subject("ens3d").bundle, subject("ens2d").bundle], **wrong)


def test_a_hard_vote_has_no_probabilities(tmp_path: Path) -> None:
    with pytest.raises(TrtbuildError, match="hard vote"):
        PredictConfig(
            bundles=(tmp_path, tmp_path), inputs=(tmp_path,), output=tmp_path, vote="hard", save_probabilities=True
        )


@pytest.mark.parametrize("scale", [1e39, 1e-46, 1.0])
def test_weights_of_any_size_mean_their_ratio(scale: float) -> None:
    paths = [subject(name).bundle for name in MEMBERS]
    files = subject(MEMBERS[0]).model.cases["small"]
    with trtbuild.open(paths, backend="onnxruntime", weights=(scale, 3 * scale)) as predictor:
        result = predictor.predict(files, probabilities=True, mirroring=False)
    with trtbuild.open(paths, backend="onnxruntime", weights=(1, 3)) as predictor:
        expected = predictor.predict(files, probabilities=True, mirroring=False)
    assert result.probabilities is not None
    np.testing.assert_allclose(result.probabilities, expected.probabilities, atol=1e-6)
    assert len(np.unique(result.segmentation)) == 3


def test_in_python_too_a_hard_vote_has_no_probabilities() -> None:
    paths = [subject(name).bundle for name in MEMBERS]
    files = subject(MEMBERS[0]).model.cases["small"]
    with trtbuild.open(paths, backend="onnxruntime", vote="hard") as predictor:
        with pytest.raises(TrtbuildError, match="hard vote"):
            predictor.predict(files, probabilities=True)
        assert predictor.predict(files, mirroring=False).probabilities is None


@pytest.mark.parametrize("given", [{"weights": (1,)}, {"vote": "hard"}])
def test_a_single_bundle_has_neither_weights_nor_votes(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TrtbuildError, match="belong to an ensemble"):
        trtbuild.open(subject("ens3d").bundle, **given)
    with pytest.raises(TrtbuildError, match="belong to an ensemble"):
        PredictConfig(bundles=(tmp_path,), inputs=(tmp_path,), output=tmp_path, **given)


def test_rules_for_labels_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    rules = tmp_path / "postprocessing.json"
    function = "remove_all_but_largest_component_from_segmentation"
    rules.write_text(
        json.dumps({"postprocessing_fns": [function], "postprocessing_kwargs": [{"labels_or_regions": [77]}]})
    )
    with pytest.raises(ModelError, match="another model"):
        trtbuild.open(subject("ens3d").bundle, postprocessing=rules)


@pytest.mark.parity
def test_labels_of_a_previous_stage_concern_only_the_members_that_want_them(tmp_path: Path) -> None:
    """3d_lowres and 3d_cascade_fullres together, nnU-Net's usual ensemble, the second stage with given labels."""
    cascade, lowres = subject("cascade3d"), subject("lowres3d")
    files = cascade.model.cases["small"]
    with trtbuild.open([lowres.bundle, cascade.bundle], backend="onnxruntime") as predictor:
        whole = predictor.predict(files, mirroring=False).segmentation
    with trtbuild.open(lowres.bundle, backend="onnxruntime") as predictor:
        first = predictor.predict(files, mirroring=False).segmentation
    with trtbuild.open([lowres.bundle, cascade.bundle], backend="onnxruntime", previous_stage=True) as predictor:
        image = predictor.predict_array
        read = trtbuild.open(lowres.bundle, backend="onnxruntime")
        with read:
            case = read.predict(files, mirroring=False).image
        assert case is not None
        given = image(case.data, case.spacing, mirroring=False, previous=first).segmentation
    np.testing.assert_array_equal(given, whole)
