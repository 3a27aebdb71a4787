"""Channel-scale formulas: the file name is the option name. Each module has `scales(amax, wmax) -> s`.

x_j W_j = (x_j / s_j) (s_j W_j) for every input channel j; a formula only chooses s. Letters as in SmoothQuant: X
activations, W weights, j the input channel. `qdq.channel_scale` measures, decides where a formula pays, and applies it.
"""
