"""The command line: one function a verb. Must not hold the logic of a stage."""
