"""Weight roundings: the file name is the option name.

Each module has two functions. `block_scales(view, H, low, high, kind)` chooses the scales of blocks, and
`round_rows(W, scale, H, low, high, kind, damping, act_order)` the codes once every weight has its scale. `kind` is the
type whose values the codes have, None for all integers from low to high.

Letters as in the papers: W (rows, columns), one row per output channel; H (columns, columns), second moment of inputs.
A view is (outer, blocks, block, inner) as of `qdq.qtensor.blocked`: a matrix is looked at in the order it is stored.
"""

from __future__ import annotations
