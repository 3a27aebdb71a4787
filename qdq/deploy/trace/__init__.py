"""Where a result comes from, for a technical file. Must not name a patient, a place of this machine, or a sample."""
