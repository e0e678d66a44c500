"""A model of a training step with engines on GPUs of their own, and a simulator of it: no ray, no torch, no GPU.

`predict` has closed forms, `simulate` draws lengths and goes from event to event, `advise` says how many rollout GPUs
a setting wants and where more of them stop paying. docs/scaling.md explains it.
"""

from trlpatch.scale.advice import Advice, advise, split
from trlpatch.scale.calibration import Calibration
from trlpatch.scale.closed_form import predict
from trlpatch.scale.lengths import Fixed, LogNormal, Measured
from trlpatch.scale.prediction import Prediction
from trlpatch.scale.setting import SHAPES, Setting
from trlpatch.scale.simulation import simulate

__all__ = [
    "SHAPES", "Advice", "Calibration", "Fixed", "LogNormal", "Measured", "Prediction", "Setting", "advise", "predict",
    "simulate", "split",
]  # fmt: skip
