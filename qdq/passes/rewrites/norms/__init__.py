"""Exact rewrites of normalizations."""
