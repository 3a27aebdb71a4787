"""Exact rewrites of attention."""
