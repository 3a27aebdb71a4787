"""What a verb answers with `--json`, and what the process says of an error. Must not know how a verb works."""
