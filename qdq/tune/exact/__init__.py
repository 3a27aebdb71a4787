"""The exact choice of what is quantized, where the predicted time is a sum over nodes and groups of them."""
