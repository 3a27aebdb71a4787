"""Exact rewrites of layers and of what lies between them."""
