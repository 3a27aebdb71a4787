"""FP16 and BF16 for what is not quantized, and why some of it stays FP32. Must not quantize."""
