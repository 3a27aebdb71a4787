"""The float model run on samples, and what is counted there. Must not choose scales."""
