"""Channel-scale formulas: the file name is the option name. Each module has `scales(amax, wmax) -> s`.

x_j W_j = (x_j / s_j) (s_j W_j) for every input channel j; a formula only chooses s. Letters as in SmoothQuant: X
activations, W weights, j the input channel. A formula with a parameter to search has `candidates(amax, wmax)` besides,
which gives several s; MINIMUM_GAIN_DB is the predicted gain below which a tensor is left alone. `qdq.channel_scale` and
`qdq.weight_scale` measure, decide where a formula pays, and apply it.
"""

from __future__ import annotations
