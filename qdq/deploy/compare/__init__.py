"""Schemes side by side, each built and scored the same way."""

from qdq.deploy.compare import volume_metrics as volume_metrics  # they register themselves
