"""Files that labels are written to, and the map that says which is of which image."""
