"""What both packages need of ONNX graphs and files. Must not import a runtime, or anything else of the project."""
