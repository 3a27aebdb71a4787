"""Input channels balanced before they are quantized: where it pays, and what carries the divisors."""
