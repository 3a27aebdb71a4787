"""What is measured of plans that a search found: accuracy on samples held out, times on a GPU of this machine."""
