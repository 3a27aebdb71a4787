"""Sources of calibration and evaluation samples.

Flow: a folder, an ``.npz`` / ``.npy`` file, a ``module.py:function`` or images -> ``open_samples`` -> ``Samples``,
which reads one sample at a time and hands it over only after checking it against what the model takes.
It must not know of quantization, change values unless a recipe says so, or make up data that was not asked for.
"""

from calib_data.elements import Stream
from calib_data.random_data import random_samples
from calib_data.samples import Samples, ShapeBounds, open_samples
from calib_data.validation import DataError, InputSpec

__all__ = ["DataError", "InputSpec", "Samples", "ShapeBounds", "Stream", "open_samples", "random_samples"]
