"""normcourse: Batch, Layer and Group Norm, trained, measured and explained."""

__version__ = "0.5.0"

from normcourse.data import Data, batches, load_data
from normcourse.engine.fit import fit
from normcourse.errors import CourseError
from normcourse.model import NormNet, count_parameters, receptive_fields, reference_net
from normcourse.norm import norm_layer
from normcourse.train import Settings, default_settings, evaluate, predict
