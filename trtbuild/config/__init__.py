"""One frozen configuration per step. A configuration that cannot work cannot be built."""

from trtbuild.config.checks import check_folds, check_limit, check_patterns, check_step_size, check_threads
from trtbuild.config.compilation import CompileConfig, Method, Rest
from trtbuild.config.precision import (
    CalibrationConfig,
    GateConfig,
    QuantizeConfig,
    QuantizedRest,
    Target,
    Threshold,
)
from trtbuild.config.prediction import PredictConfig, Vote, check_devices, check_ensemble
from trtbuild.config.tensorrt import Compatibility, TensorRTConfig

__all__ = [
    "CalibrationConfig",
    "Compatibility",
    "CompileConfig",
    "GateConfig",
    "Method",
    "PredictConfig",
    "QuantizeConfig",
    "QuantizedRest",
    "Rest",
    "Target",
    "TensorRTConfig",
    "Threshold",
    "Vote",
    "check_devices",
    "check_ensemble",
    "check_folds",
    "check_limit",
    "check_patterns",
    "check_step_size",
    "check_threads",
]
