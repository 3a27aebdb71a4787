"""Times of engines on the GPU of this machine, and what they say of the GPU. Must not predict, nor quantize."""
