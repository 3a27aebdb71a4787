"""Compile and run: one file a backend, and the layer tables they leave. Must not know what quantization asks for."""
