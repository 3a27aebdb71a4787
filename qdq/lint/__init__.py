"""What TensorRT will not take of anyone's Q/DQ model, and what can be repaired without data. Must not need samples."""
