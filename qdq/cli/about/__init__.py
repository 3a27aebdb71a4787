"""Verbs about a plan, samples, a machine, a file, or the command line itself; they make nothing of a model."""
