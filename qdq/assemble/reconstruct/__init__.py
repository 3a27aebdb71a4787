"""Codes of weights learned block by block from activations, so that each block makes up for what those before it err.

Q/DQ model -> `cuts.py`: blocks between few tensors -> `operators.py`: their nodes in PyTorch -> `learning.py`: up or
down for every weight -> `blockwise.py`: block after block, each judged. It must not change scales.
"""
