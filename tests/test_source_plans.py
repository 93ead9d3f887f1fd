"""plans.json and dataset.json -> ModelSpec: against nnU-Net's own managers, and against all that can be wrong."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from source_models import legacy_configuration, make_dataset, make_plans, replaced

from trtbuild.errors import ModelError
from trtbuild.source import spec_from_plans
from trtbuild.source.architecture import architecture_from_plans
from trtbuild.source.fields import Field, field_from_json
from trtbuild.source.labels import labels_from_dataset
from trtbuild.source.network import MOVED
from trtbuild.source.resampling import ARGUMENTS, NOT_CALLABLE
from trtbuild.spec import CT, ModelSpec, NoNormalization, Resampling, RescaleTo01, RGBTo01, ZScore

CONFIGURATION = ("configurations", "3d_fullres")


def parse(plans: Any = None, dataset: Any = None, configuration: str = "3d_fullres") -> ModelSpec:
    plans, dataset = plans or make_plans(), dataset or make_dataset()
    return spec_from_plans(plans, dataset, configuration=configuration, trainer="nnUNetTrainer")


def test_every_fact_of_ordinary_plans_arrives_in_the_spec() -> None:
    spec = parse()
    assert (spec.dataset, spec.plans, spec.configuration) == ("Dataset042_Tiny", "nnUNetPlans", "3d_fullres")
    assert (spec.trainer, spec.channels, spec.previous_stage) == ("nnUNetTrainer", ("MR0",), None)
    assert (spec.patch, spec.spacing, spec.transpose_forward) == ((16, 24, 8), (1.5, 1.0, 2.5), (1, 0, 2))
    assert (spec.transpose_backward, spec.normalization) == ((1, 0, 2), (ZScore(masked=True),))
    assert spec.resample_data == Resampling(method="spline", is_segmentation=False, order=3, order_z=0,
                                            separate_z="auto", anisotropy_threshold=3.0)  # fmt: skip
    assert (spec.resample_segmentation.is_segmentation, spec.resample_segmentation.order) == (True, 1)
    assert (spec.resample_probabilities.is_segmentation, spec.resample_probabilities.order) == (False, 1)
    assert (spec.reader, spec.file_ending, spec.labels.values) == ("SimpleITKIO", ".nii.gz", (0, 1, 2))


# --- normalisation and channels ---


def test_each_normalisation_scheme_becomes_its_value_with_the_numbers_of_its_channel() -> None:
    schemes = ["CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization",
               "RGBTo01Normalization", "CTNormalization"]  # fmt: skip
    plans = make_plans(channels=6, normalization_schemes=schemes, use_mask_for_norm=[False] * 6)
    expected = (CT(lower=-50.0, upper=250.0, mean=100.5, std=20.25), ZScore(masked=False), NoNormalization(),
                RescaleTo01(), RGBTo01(), CT(lower=-50.0, upper=250.0, mean=105.5, std=20.25))  # fmt: skip
    assert parse(plans, make_dataset(channels=6)).normalization == expected


def test_the_older_name_of_the_intensity_properties_is_read_where_the_newer_is_missing() -> None:
    plans = make_plans(normalization_schemes=["CTNormalization"])
    newer = plans.pop("foreground_intensity_properties_per_channel")
    old = parse({**plans, "foreground_intensity_properties_by_modality": newer})
    both = {
        **plans,
        "foreground_intensity_properties_per_channel": newer,
        "foreground_intensity_properties_by_modality": {},
    }
    assert old.normalization == parse(both).normalization == (CT(lower=-50.0, upper=250.0, mean=100.5, std=20.25),)


def test_intensity_properties_are_not_needed_without_ct_normalisation() -> None:
    assert parse(replaced(make_plans(), ("foreground_intensity_properties_per_channel",), ...)).channels == ("MR0",)


@pytest.mark.parametrize("previous", [None, "3d_lowres"])
@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_input_channels_are_those_that_nnunet_counts(key: str, previous: str | None) -> None:
    plans = make_plans(channels=3, previous_stage=previous)
    dataset = {**make_dataset(channel_names=...), key: {"2": "C", "0": "A", "1": "B"}}
    spec = parse(plans, dataset)
    assert spec.channels == ("A", "B", "C")
    assert spec.network_channels == determine_num_input_channels(PlansManager(plans), "3d_fullres", dataset)


# --- labels ---

LABEL = st.integers(0, 4)
VALUES = st.one_of(LABEL, LABEL, LABEL.map(str), st.lists(LABEL, min_size=1, max_size=3))
BACKGROUND = st.sampled_from([{"background": value} for value in (*[0] * 12, "0", 1, [0])] + [{}])


@st.composite
def label_cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[int] | None]:
    """Labels and regions_class_order as dataset.json may hold them: mostly right, at times wrong in one place."""
    foreground = draw(
        st.one_of(
            st.permutations("abcd").map(lambda names: {name: i + 1 for i, name in enumerate(names)}),
            st.dictionaries(st.sampled_from("abcdef"), VALUES, max_size=5),
            st.dictionaries(st.sampled_from("abcdef"), st.lists(LABEL, min_size=1, max_size=3), min_size=1, max_size=4),
        )
    )
    labels = {**draw(BACKGROUND), **foreground}
    values = [int(v) for value in labels.values() for v in (value if isinstance(value, list) else [value])]
    ignore = draw(st.sampled_from([None, None, None, max(values, default=0) + 1, max(values, default=0) + 1, 2]))
    heads = sum(1 for value in foreground.values() if value != 0 and set(np.atleast_1d(value)) != {0})
    length = draw(st.sampled_from([heads] * 6 + [heads + 1]))
    order = draw(st.sampled_from([None, *[draw(st.lists(st.integers(1, 5), min_size=length, max_size=length))] * 5]))
    return labels if ignore is None else {**labels, "ignore": ignore}, order


@settings(max_examples=500, deadline=None)
@given(case=label_cases())
def test_labels_mean_what_nnunets_label_manager_makes_of_them(case: tuple[dict[str, Any], list[int] | None]) -> None:
    labels, order = case
    try:
        reference = LabelManager(labels, order)
    except (RuntimeError, AssertionError, ValueError, TypeError):
        with pytest.raises(ModelError):
            labels_from_dataset(Field({"labels": labels, "regions_class_order": order}, "dataset.json"))
        return
    try:
        parsed = labels_from_dataset(Field({"labels": labels, "regions_class_order": order}, "dataset.json"))
    except ModelError:
        # Refused on purpose: gaps, where nnU-Net writes the head's index and not the label, and strings in regions.
        if reference.has_regions:
            assert any(isinstance(value, str) for value in labels.values())
        else:
            assert reference.all_labels != list(range(len(reference.all_labels)))
        return
    assert (parsed.decision == "regions") == reference.has_regions
    assert parsed.heads == reference.num_segmentation_heads
    assert list(parsed.foreground) == reference.foreground_labels
    assert parsed.ignore == reference.ignore_label
    if reference.has_regions:
        assert list(parsed.values) == reference.regions_class_order
    else:
        assert list(parsed.values) == reference.all_labels


def test_names_map_to_the_values_that_they_cover_and_ignore_has_no_head() -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3, "ignore": 4}
    parsed = parse(dataset=make_dataset(labels=labels, regions_class_order=[1, 2, 3])).labels
    assert parsed.names == {"background": (0,), "whole": (1, 2, 3), "core": (2, 3), "active": (3,)}
    assert (parsed.decision, parsed.values, parsed.ignore, parsed.heads) == ("regions", (1, 2, 3), 4, 3)


# --- resampling ---


@pytest.mark.parametrize(
    "function", ["resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"]
)
def test_accepted_arguments_of_a_resampling_function_are_those_of_its_signature(function: str) -> None:
    parameters = list(inspect.signature(recursive_find_resampling_fn_by_name(function)).parameters)
    assert set(parameters[4:]) == ARGUMENTS[function]


def test_missing_arguments_get_the_defaults_of_nnunets_functions() -> None:
    spline = inspect.signature(recursive_find_resampling_fn_by_name("resample_data_or_seg_to_shape")).parameters
    separate = {None: "auto", True: "always", False: "never"}
    parsed = parse(make_plans(resampling_fn_data_kwargs={})).resample_data
    assert parsed.is_segmentation == spline["is_seg"].default
    assert (parsed.order, parsed.order_z) == (spline["order"].default, spline["order_z"].default)
    assert parsed.separate_z == separate[spline["force_separate_z"].default] == "never"
    assert parsed.anisotropy_threshold == spline["separate_z_anisotropy_threshold"].default
    torch = inspect.signature(recursive_find_resampling_fn_by_name("resample_torch_fornnunet")).parameters
    function = {"resampling_fn_data": "resample_torch_fornnunet", "resampling_fn_data_kwargs": {}}
    parsed = parse(make_plans(**function)).resample_data
    assert (parsed.method, parsed.order, parsed.order_z) == ("torch", 1, 0)
    assert parsed.separate_z == separate[torch["force_separate_z"].default] == "auto"


@pytest.mark.parametrize(("forced", "expected"), [(None, "auto"), (True, "always"), (False, "never")])
@pytest.mark.parametrize("function", ["resample_data_or_seg_to_shape", "resample_torch_fornnunet"])
def test_separate_z_is_forced_on_or_off_or_left_to_the_spacing(
    function: str, forced: bool | None, expected: str
) -> None:
    arguments = {"is_seg": False, "force_separate_z": forced, "separate_z_anisotropy_threshold": 4}
    plans = make_plans(resampling_fn_probabilities=function, resampling_fn_probabilities_kwargs=arguments)
    parsed = parse(plans).resample_probabilities
    assert (parsed.separate_z, parsed.anisotropy_threshold) == (expected, 4.0)


def test_no_resampling_hack_is_no_resampling() -> None:
    functions = {f"resampling_fn_{role}": "no_resampling_hack" for role in ("data", "seg", "probabilities")}
    spec = parse(make_plans(**functions, **{f"{key}_kwargs": {} for key in functions}))
    assert {spec.resample_data.method, spec.resample_segmentation.method, spec.resample_probabilities.method} == {
        "none"
    }


# --- configurations and old plans ---


def test_inherited_settings_are_merged_as_nnunet_merges_them() -> None:
    plans = make_plans()
    plans["configurations"] |= {
        "3d_cascade_fullres": {"inherits_from": "3d_small", "previous_stage": "3d_lowres", "spacing": [3.0, 3.0, 3.0]},
        "3d_small": {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8], "spacing": [2.0, 2.0, 2.0]},
    }
    spec = parse(plans, configuration="3d_cascade_fullres")
    reference = PlansManager(plans).get_configuration("3d_cascade_fullres")
    assert (list(spec.patch), list(spec.spacing)) == (reference.patch_size, reference.spacing)
    assert spec.previous_stage == reference.previous_stage_name == "3d_lowres"
    architecture = architecture_from_plans(plans, "3d_cascade_fullres")
    assert (architecture.name, architecture.arguments) == (
        reference.network_arch_class_name,
        reference.network_arch_init_kwargs,
    )


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_plans_before_2_3_give_the_architecture_that_nnunet_reconstructs(kind: str, dimensions: int) -> None:
    plans = make_plans(dimensions, **legacy_configuration(dimensions, kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = ConfigurationManager(dict(plans["configurations"]["3d_fullres"]))
    architecture = architecture_from_plans(plans, "3d_fullres")
    name = reference.network_arch_class_name
    assert architecture.name == MOVED.get(name, name)
    assert architecture.arguments == reference.network_arch_init_kwargs
    assert list(architecture.imported) == reference.network_arch_init_kwargs_req_import
    assert parse(plans).dimensions == dimensions


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient",
                                    "NaturalImage2DIO", "Tiff3DIO"])  # fmt: skip
def test_every_reader_of_nnunet_is_known(reader: str) -> None:
    assert recursive_find_reader_writer_by_name(reader).__name__ == reader
    assert parse(replaced(make_plans(), ("image_reader_writer",), reader)).reader == reader


# --- refusals: what is replaced, by what, and what the message must hold ---

PLANS_FAULTS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("dataset_name",), ..., "dataset_name"),
    (("plans_name",), 7, "plans_name"),
    (("configurations",), [], "configurations"),
    (("image_reader_writer",), "MyReader", "image_reader_writer"),
    (("label_manager",), "MyLabelManager", "label_manager"),
    (("transpose_forward",), [0, 1], "transpose_forward"),
    (("transpose_forward",), [0, 1, 1], "permutation"),
    (("transpose_backward",), [2, 0, 1], "undo"),
    (("transpose_backward",), [0, 1, 3], "transpose_backward[2]"),
    ((*CONFIGURATION, "preprocessor_name"), "MyPreprocessor", "preprocessor_name"),
    ((*CONFIGURATION, "preprocessor_name"), ..., "preprocessor_name"),
    ((*CONFIGURATION, "normalization_schemes"), ["MyNormalization"], "normalization_schemes[0]"),
    ((*CONFIGURATION, "normalization_schemes"), ["ZScoreNormalization"] * 2, "use_mask_for_norm"),
    ((*CONFIGURATION, "use_mask_for_norm"), [1], "use_mask_for_norm[0]"),
    ((*CONFIGURATION, "patch_size"), [16], "patch"),
    ((*CONFIGURATION, "patch_size"), [16, 16.0, 16], "patch_size[1]"),
    ((*CONFIGURATION, "patch_size"), [16, 0, 16], "patch_size[1]"),
    ((*CONFIGURATION, "patch_size"), [16, 10**9, 16], "patch_size[1]"),
    ((*CONFIGURATION, "spacing"), [1.0, float("nan"), 1.0], "spacing[1]"),
    ((*CONFIGURATION, "spacing"), [1.0, -1.0, 1.0], "spacing"),
    ((*CONFIGURATION, "spacing"), [1.0, 1.0], "spacing"),
    ((*CONFIGURATION, "resampling_fn_data"), "resample_torch_simple", "resampling_fn_data"),
    ((*CONFIGURATION, "resampling_fn_seg"), "my_resampling", "resampling_fn_seg"),
    ((*CONFIGURATION, "resampling_fn_probabilities"), ..., "resampling_fn_probabilities"),
    ((*CONFIGURATION, "resampling_fn_data_kwargs", "order"), 6, "resampling_fn_data_kwargs.order"),
    ((*CONFIGURATION, "resampling_fn_data_kwargs", "order"), True, "resampling_fn_data_kwargs.order"),
    ((*CONFIGURATION, "resampling_fn_data_kwargs", "anti_aliasing"), True, "anti_aliasing"),
    ((*CONFIGURATION, "resampling_fn_data_kwargs", "force_separate_z"), "no", "force_separate_z"),
    ((*CONFIGURATION, "inherits_from"), "3d_fullres", "3d_fullres -> 3d_fullres"),
    ((*CONFIGURATION, "inherits_from"), "3d_lowres", "3d_lowres"),
    ((*CONFIGURATION, "previous_stage"), ["3d_lowres"], "previous_stage"),
]  # fmt: skip
DATASET_FAULTS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("labels",), ..., "labels"),
    (("labels", "background"), 1, "background"),
    (("labels", "background"), ..., "background"),
    (("labels", "organ"), 7, "gap"),
    (("labels", "organ"), -1, "labels.organ"),
    (("labels", "organ"), 1.5, "labels.organ"),
    (("labels", "organ"), [], "labels.organ"),
    (("labels", "organ"), [1, 2], "regions_class_order"),
    (("labels", "ignore"), 5, "labels.ignore"),
    (("labels", "ignore"), [3], "labels.ignore"),
    (("channel_names",), ..., "channel_names"),
    (("channel_names",), {}, "channel_names"),
    (("channel_names",), {"1": "CT"}, "channel_names"),
    (("channel_names",), {"0": "A", "1": "B"}, "Channels and normalisation"),
    (("file_ending",), "nii.gz", "file_ending"),
    (("file_ending",), "./../x", "file_ending"),
    (("file_ending",), ..., "file_ending"),
]


@pytest.mark.parametrize(("path", "value", "named"), PLANS_FAULTS)
def test_a_fault_in_the_plans_is_refused_by_name(path: tuple[Any, ...], value: Any, named: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse(replaced(make_plans(), path, value))
    assert named in str(caught.value)


@pytest.mark.parametrize(("path", "value", "named"), DATASET_FAULTS)
def test_a_fault_in_dataset_json_is_refused_by_name(path: tuple[Any, ...], value: Any, named: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse(dataset=replaced(make_dataset(), path, value))
    assert named in str(caught.value)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match="CTNormalization, ZScoreNormalization, NoNormalization"):
        parse(make_plans(normalization_schemes=["ct"]))


@pytest.mark.parametrize("arguments", [{"mode": "cubic"}, {"aniso_axis_mode": "linear"},
                                       {"is_seg": True, "memefficient_seg_resampling": True}])  # fmt: skip
def test_torch_resampling_in_a_way_that_is_not_reproduced_is_refused(arguments: dict[str, Any]) -> None:
    function = {"resampling_fn_seg": "resample_torch_fornnunet", "resampling_fn_seg_kwargs": arguments}
    with pytest.raises(ModelError, match="resampling_fn_seg_kwargs"):
        parse(make_plans(previous_stage="3d_lowres", **function))


def test_how_segmentations_would_be_resampled_does_not_matter_without_a_previous_stage() -> None:
    arguments = {"is_seg": True, "memefficient_seg_resampling": True}
    parsed = parse(make_plans(resampling_fn_seg="resample_torch_fornnunet", resampling_fn_seg_kwargs=arguments))
    assert (parsed.previous_stage, parsed.resample_segmentation.method) == (None, "torch")


def test_every_function_that_plans_can_name_is_known_or_cannot_be_called_by_nnunet() -> None:
    from nnunetv2.preprocessing.resampling import default_resampling, no_resampling, resample_torch

    functions = {
        name for module in (default_resampling, no_resampling, resample_torch)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name.startswith(("resample", "no_"))
    }  # fmt: skip
    assert functions == {*ARGUMENTS, *NOT_CALLABLE}
    data, spacing = np.zeros((1, 4, 4, 4), np.float32), [1.0, 1.0, 1.0]
    for name in NOT_CALLABLE:
        with pytest.raises((TypeError, AssertionError, ValueError, RuntimeError, IndexError)):
            recursive_find_resampling_fn_by_name(name)(data, [5, 5, 5], spacing, spacing, is_seg=False)
        with pytest.raises(ModelError, match="nnU-Net itself cannot resample"):
            parse(make_plans(resampling_fn_data=name, resampling_fn_data_kwargs={"is_seg": False}))


def test_longer_circles_of_inheritance_are_refused() -> None:
    plans = make_plans()
    plans["configurations"] |= {"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}}
    with pytest.raises(ModelError, match="a -> b -> a"):
        parse(plans, configuration="a")


def test_an_unknown_configuration_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ModelError, match="expected: 3d_fullres"):
        parse(configuration="3d_lowres")


@pytest.mark.parametrize("key", ["percentile_00_5", "mean", "std"])
def test_ct_normalisation_needs_every_number_to_be_finite(key: str) -> None:
    path = ("foreground_intensity_properties_per_channel", "0", key)
    with pytest.raises(ModelError, match=key):
        parse(replaced(make_plans(normalization_schemes=["CTNormalization"]), path, float("nan")))


def test_swapped_percentiles_are_refused() -> None:
    path = ("foreground_intensity_properties_per_channel", "0", "percentile_00_5")
    with pytest.raises(ModelError, match="percentile"):
        parse(replaced(make_plans(normalization_schemes=["CTNormalization"]), path, 251.0))


@pytest.mark.parametrize("path", [("UNet_class_name",), ("n_conv_per_stage_encoder",), ("unet_max_num_features",)])
def test_old_plans_with_a_missing_entry_are_refused_by_name(path: tuple[str, ...]) -> None:
    plans = replaced(make_plans(**legacy_configuration()), (*CONFIGURATION, *path), ...)
    with pytest.raises(ModelError, match=path[0]):
        architecture_from_plans(plans, "3d_fullres")


def test_old_plans_with_an_unknown_class_are_refused() -> None:
    with pytest.raises(ModelError, match="UNet_class_name"):
        architecture_from_plans(make_plans(**{**legacy_configuration(), "UNet_class_name": "MyUNet"}), "3d_fullres")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"plans"'])
def test_a_file_that_is_no_json_object_is_refused_by_name(content: bytes) -> None:
    with pytest.raises(ModelError, match=r"plans\.json"):
        field_from_json(content, "plans.json")


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in pairs for path in [(*prefix, key), *_paths(item, (*prefix, key))]]


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_junk_anywhere_in_the_two_files_is_a_model_error_or_harmless(data: st.DataObject) -> None:
    plans = make_plans(normalization_schemes=["CTNormalization"])
    if data.draw(st.booleans()):
        plans = make_plans(**legacy_configuration())
    dataset = make_dataset(regions_class_order=[1, 2])
    whole = {"plans": plans, "dataset": dataset}
    changed = replaced(whole, data.draw(st.sampled_from(_paths(whole)[2:])), data.draw(JUNK))
    try:
        spec_from_plans(changed["plans"], changed["dataset"], configuration="3d_fullres", trainer="nnUNetTrainer")
        architecture_from_plans(changed["plans"], "3d_fullres")
    except ModelError as error:
        message = str(error)
    else:
        message = "configuration"  # harmless: the entry is not read, or the junk happens to be of the right kind
    assert any(file in message for file in ("plans.json", "dataset.json", "configuration"))
