"""Which nodes are quantized: what each rule says of each node, and why not."""
