"""A copy of a Q/DQ model with what can be repaired without data."""
