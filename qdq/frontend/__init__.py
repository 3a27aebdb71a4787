"""Where models come from: a PyTorch module, or what a MODEL argument names, becomes an ONNX file that is checked.

A module may not be changed, and nothing is downloaded.
"""
