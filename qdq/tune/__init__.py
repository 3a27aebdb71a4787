"""The search for the variant that is predicted to run fastest, or measured so. Must not know who compiles."""
