"""The range of least squared error, or one wider than was seen where that costs next to nothing.

A tensor whose largest values are near its usual ones, such as means over an image, has codes to spare: its range may be
twice what samples showed before its rounding counts beside that of the network's other tensors. Such tensors are also
those that clipping hurts most. A tensor of rare large values has no codes to spare and keeps its range of least error.
"""

from __future__ import annotations

from qdq.measure.calibrators import Calibrator, mse

# Of a tensor's energy, 38 dB below it: of INT8 networks whose outputs keep 25 to 30 dB a tensor has that much anyway.
SPARE = 10**-3.8

CALIBRATOR = Calibrator(limit=mse.limit, order=5, least_error=True, spare=SPARE)
