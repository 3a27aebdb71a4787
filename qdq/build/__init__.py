"""An ONNX file into an engine with its layer table and manifest, and its predicted time. Must not change a model."""
