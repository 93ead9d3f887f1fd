"""Training patches -> ScaleTable: how large the activations of a network get, and what scale each of them takes.

Does: reads preprocessed cases, samples patches as nnU-Net's training does, keeps histograms of activations, decides
thresholds. Takes: folders of nnU-Net's, and a `Network` that it is given. Gives: a ScaleTable.
May touch: preprocessed data (read), its own state and table. Knows neither trtbuild nor how a network is run.
"""

from trtbuild_calibration.cache import (
    CalibrationCache,
    cache_from_bytes,
    cache_from_scales,
    check_cache,
    read_cache,
    write_cache,
)
from trtbuild_calibration.cases import Case, cases_from_folder, digest
from trtbuild_calibration.coverage import ClassCoverage, Coverage
from trtbuild_calibration.errors import CacheError, CalibrationError
from trtbuild_calibration.histogram import BINS, Histogram
from trtbuild_calibration.network import Network, Patches, Target
from trtbuild_calibration.observe import Observation, Progress, observe
from trtbuild_calibration.patches import Patch, PatchSequence, Place, read_patch
from trtbuild_calibration.sampling import Sample, sample_places
from trtbuild_calibration.sources import ArraySource, FileSource, Source, open_case
from trtbuild_calibration.split import split_cases, validation_cases
from trtbuild_calibration.table import (
    VERSION,
    Entry,
    Fingerprint,
    ScaleTable,
    read_table,
    table_from_bytes,
    table_from_observation,
    write_table,
)
from trtbuild_calibration.thresholds import METHODS, PERCENTILE, Method, Threshold, scale_of, threshold, thresholds

__all__ = [
    "BINS",
    "METHODS",
    "PERCENTILE",
    "VERSION",
    "ArraySource",
    "CacheError",
    "CalibrationCache",
    "CalibrationError",
    "Case",
    "ClassCoverage",
    "Coverage",
    "Entry",
    "FileSource",
    "Fingerprint",
    "Histogram",
    "Method",
    "Network",
    "Observation",
    "Patch",
    "PatchSequence",
    "Patches",
    "Place",
    "Progress",
    "Sample",
    "ScaleTable",
    "Source",
    "Target",
    "Threshold",
    "cache_from_bytes",
    "cache_from_scales",
    "cases_from_folder",
    "check_cache",
    "digest",
    "observe",
    "open_case",
    "read_cache",
    "read_patch",
    "read_table",
    "sample_places",
    "scale_of",
    "split_cases",
    "table_from_bytes",
    "table_from_observation",
    "threshold",
    "thresholds",
    "validation_cases",
    "write_cache",
    "write_table",
]
