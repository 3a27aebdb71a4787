"""A copy of a Q/DQ model with what can be mended without data."""
