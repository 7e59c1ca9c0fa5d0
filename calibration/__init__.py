"""Arrays in, numbers and diagrams out: calibration, selective prediction, shift, resampling.

NumPy float64 throughout; no model, no network. `plots` is imported by its own name, because it
loads matplotlib.
"""

from cwdpo_bench.calibration.binned import (
    BINS,
    ReliabilityBins,
    bin_statistics,
    ece,
    ece_adaptive,
    ece_classwise,
    ece_debiased,
    ece_debiased_from_sums,
    ece_from_sums,
    equal_mass_index,
    equal_width_index,
    mce,
    mce_from_sums,
    reliability,
)
from cwdpo_bench.calibration.resampling import (
    LEVEL,
    RESAMPLES,
    bootstrap_stderr,
    bootstrap_sums,
    cluster_sums,
    paired_p_value,
    percentile_interval,
)

__all__ = [
    "BINS",
    "LEVEL",
    "RESAMPLES",
    "ReliabilityBins",
    "bin_statistics",
    "bootstrap_stderr",
    "bootstrap_sums",
    "cluster_sums",
    "ece",
    "ece_adaptive",
    "ece_classwise",
    "ece_debiased",
    "ece_debiased_from_sums",
    "ece_from_sums",
    "equal_mass_index",
    "equal_width_index",
    "mce",
    "mce_from_sums",
    "paired_p_value",
    "percentile_interval",
    "reliability",
]
