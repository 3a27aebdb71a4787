"""The float model in ONNX Runtime: whole, in parts, in stages, within a memory budget."""
