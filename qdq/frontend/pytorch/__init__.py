"""What is done with torch, which is imported inside the functions: a module is called flat, captured and written."""
