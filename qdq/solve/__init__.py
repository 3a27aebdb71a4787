"""Ranges into scales, weights into codes. Must not write a graph."""
