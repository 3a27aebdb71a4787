"""One ONNX model as a value, in memory and on disk. Must not decide anything about quantization."""
