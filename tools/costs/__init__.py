"""Parts of tools/bench_cost.py: published latencies, models of time, and their fit."""
