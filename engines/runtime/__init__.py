"""Run what was deployed, for services: files are verified, then loaded from the very bytes that were verified.

`predictor.open` is `engines.open`. An engine runs on a GPU that it fits, the Q/DQ model in ONNX Runtime elsewhere. What
an image becomes before and after a run, a package that registers itself for `engines.segment` knows; this must not.
"""
