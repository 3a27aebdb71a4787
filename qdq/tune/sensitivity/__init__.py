"""The error at the outputs of each group of nodes in each precision that it may have."""
