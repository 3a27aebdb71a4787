"""What prices are read from: models compiled here or in other processes, float forms. Must not price."""
