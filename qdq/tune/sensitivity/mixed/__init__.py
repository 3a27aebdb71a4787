"""A plan of several precisions: one model of error and cost, one search for every aim and limit, and its front."""
