"""Weight roundings: the file name is the option name. Each module has `round_rows(W, scale, H, low, high)`.

Letters as in the papers: W (rows, columns), one row per output channel; H (columns, columns), second moment of inputs.
"""
