"""Exact changes of a graph: the outputs stay the same. Must not decide whether one pays."""
