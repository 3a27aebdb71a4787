"""What a price is read from: models compiled in this process or in others, float forms of Q/DQ models. Must not price."""
