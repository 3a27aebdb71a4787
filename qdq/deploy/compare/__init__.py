"""Schemes side by side, each built and scored the same way."""
