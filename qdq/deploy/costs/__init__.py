"""What costs accuracy where a result is poor: a model with switches, and what running it finds."""
