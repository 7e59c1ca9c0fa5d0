"""Arrays in, numbers and diagrams out: calibration, selective prediction, shift, resampling.

NumPy float64 throughout; no model, no network. `plots` is imported by its own name, because it
loads matplotlib.
"""

from cwdpo_bench.calibration.binned import (
    BINS,
    ReliabilityBins,
    bin_statistics,
    class_statistics,
    ece,
    ece_adaptive,
    ece_classwise,
    ece_classwise_from_sums,
    ece_debiased,
    ece_debiased_from_sums,
    ece_from_sums,
    equal_mass_index,
    equal_width_index,
    mce,
    mce_from_sums,
    reliability,
)
from cwdpo_bench.calibration.decomposition import (
    BrierParts,
    brier_decomposition,
    reliability_part,
    resolution_part,
    uncertainty_part,
)
from cwdpo_bench.calibration.proper import brier, entropy, nll
from cwdpo_bench.calibration.resampling import (
    LEVEL,
    RESAMPLES,
    Estimate,
    bootstrap_counts,
    bootstrap_estimate,
    bootstrap_stderr,
    bootstrap_sums,
    cluster_sums,
    paired_p_value,
    percentile_interval,
)
from cwdpo_bench.calibration.selective import (
    RiskCoverage,
    aurc,
    aurc_from_sums,
    auroc,
    auroc_from_sums,
    risk_coverage,
)
from cwdpo_bench.calibration.shift import jensen_shannon, total_variation
from cwdpo_bench.calibration.temperature import (
    apply_temperature,
    cross_fit_temperature,
    fit_temperature,
)

__all__ = [
    "BINS",
    "LEVEL",
    "RESAMPLES",
    "BrierParts",
    "Estimate",
    "ReliabilityBins",
    "RiskCoverage",
    "apply_temperature",
    "aurc",
    "aurc_from_sums",
    "auroc",
    "auroc_from_sums",
    "bin_statistics",
    "bootstrap_counts",
    "bootstrap_estimate",
    "bootstrap_stderr",
    "bootstrap_sums",
    "brier",
    "brier_decomposition",
    "class_statistics",
    "cluster_sums",
    "cross_fit_temperature",
    "ece",
    "ece_adaptive",
    "ece_classwise",
    "ece_classwise_from_sums",
    "ece_debiased",
    "ece_debiased_from_sums",
    "ece_from_sums",
    "entropy",
    "equal_mass_index",
    "equal_width_index",
    "fit_temperature",
    "jensen_shannon",
    "mce",
    "mce_from_sums",
    "nll",
    "paired_p_value",
    "percentile_interval",
    "reliability",
    "reliability_part",
    "resolution_part",
    "risk_coverage",
    "total_variation",
    "uncertainty_part",
]
