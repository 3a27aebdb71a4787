"""What some keys of a recipe hold, and the file that holds them."""
