"""Reconstruction: start from codes of each layer's second moments, then learn them block by block from activations.

The first half is that of `descent`, and all there is where nobody runs the second: `assemble.reconstruct`, which needs
PyTorch, the samples, and the Q/DQ model around the weights.
"""

from __future__ import annotations

from dataclasses import replace

from qdq.solve.rounding import descent

ROUNDING = replace(descent.ROUNDING, reconstructs=True)
