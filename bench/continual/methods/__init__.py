"""The methods that are compared, one class each; all use Adam, Muon in part."""

from . import norms, penalties, resets, spectral
from .base import FOUR, Method

METHODS: dict[str, type[Method]] = {
    "none": Method, "l2": penalties.L2, "l2_init": penalties.L2Init,
    "l2_er": penalties.L2EffectiveRank, "parseval": penalties.Parseval,
    "isometry": penalties.Isometry, "shrink_perturb": resets.ShrinkAndPerturb,
    "redo": resets.ReDo, "continual_backprop": resets.ContinualBackprop,
    "continual_backprop_10k": resets.MatureBackprop, "snr": resets.SelfNormalizedResets,
    "spectral_norm": norms.SpectralNorm,
    "layer_norm": norms.LayerNorm, "weight_projection": norms.WeightProjection,
    "nap": norms.NormalizeAndProject, "muon": norms.Muon, "spectral": spectral.Spectral,
    "spectral_k1": spectral.Spectral1, "spectral_k4": spectral.Spectral4,
    "spectral_k8": spectral.Spectral8, "spectral_four": spectral.SpectralFour,
    "spectral_auto": spectral.SpectralAuto, "spectral_sharp": spectral.SpectralSharp,
    "spectral_above": spectral.SpectralAbove, "spectral_decoupled": spectral.SpectralDecoupled,
    "spectral_cap": spectral.SpectralCap, "spectral_operator": spectral.SpectralOperator,
    "spectral_adamw": spectral.InOptimizer,
}  # fmt: skip

__all__ = ["FOUR", "METHODS", "Method"]
