"""The search for the variant that is predicted to run fastest. Must not know the backend that compiles."""
