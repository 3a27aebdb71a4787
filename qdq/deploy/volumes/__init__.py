"""Whole volumes: a network run over them window by window, labels on the image's own grid, and what they are worth."""
