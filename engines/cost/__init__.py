"""Predicted times of compiled layers on GPUs that are not here. Must not compile."""
