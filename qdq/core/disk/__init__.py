"""What a run keeps on disk beside its results: arrays that do not fit its memory, and work for the next run."""
