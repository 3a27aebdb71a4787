"""Proofs of an engine: what each node runs in, how close its outputs are, what it was made from. Must not compile."""
