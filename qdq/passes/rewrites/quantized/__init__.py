"""Exact rewrites of a Q/DQ model, which depend on its scales."""
