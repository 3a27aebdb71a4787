"""Words, files and arithmetic under every stage. Must not know ONNX models."""
