"""The ops in Triton, for CUDA devices."""
