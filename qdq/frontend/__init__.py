"""Where models come from: a PyTorch module, or what a MODEL argument names, becomes an ONNX file that is checked.

Must not change a module, download anything, or leave a file that computes something else than its source.
"""
