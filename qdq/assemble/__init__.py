"""Scales and codes into a Q/DQ model, and what held-out samples decide about it. Must not compile."""
