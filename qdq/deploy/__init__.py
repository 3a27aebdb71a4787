"""The whole job and its report. Must not hold the arithmetic of a stage."""
