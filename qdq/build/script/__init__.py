"""build_engine.sh: what builds a TensorRT engine on the machine with the GPU, where it cannot be built here."""
