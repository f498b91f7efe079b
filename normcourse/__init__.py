"""normcourse: Batch, Layer and Group Norm, trained, measured and explained.

The lessons use norm, model, data, train, results, plot and cube. What they need not know, such as
checkpoints, downloads, several processes and the command line, stands in normcourse.engine.
"""

import os
import signal
import sys

__version__ = "0.6.0"

# The command, which is being imported; sys.argv is empty where Python is embedded.
if os.path.basename("".join(sys.argv[:1])) in ("-m", "normcourse"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback

from normcourse.data import Data, batches, load_data
from normcourse.engine.fit import fit
from normcourse.errors import CourseError
from normcourse.model import NormNet, count_parameters, reference_net
from normcourse.norm import norm_layer
from normcourse.train import Settings, default_settings, evaluate, predict
