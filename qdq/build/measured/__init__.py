"""Models built and timed on a GPU of this machine, in the place of predicted times. Must not choose."""
