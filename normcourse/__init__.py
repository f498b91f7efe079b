"""normcourse: Batch, Layer and Group Norm, trained, measured and explained."""

__version__ = "0.4.0"

from normcourse.data import CourseError, Data, batches, load_data
from normcourse.model import NormNet, count_parameters, receptive_fields, reference_net
from normcourse.norm import norm_layer
from normcourse.train import Settings, default_settings, evaluate, fit, predict

__all__ = [
    "CourseError", "Data", "NormNet", "Settings", "batches", "count_parameters", "default_settings", "evaluate", "fit",
    "load_data", "norm_layer", "predict", "receptive_fields", "reference_net",
]  # fmt: skip
