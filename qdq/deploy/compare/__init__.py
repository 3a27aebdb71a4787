"""Schemes side by side, each built and scored the same way."""

from qdq.deploy.compare import masked_metrics as masked_metrics, volume_metrics as volume_metrics  # register themselves
