"""The engine of CUDA tensors: Triton kernels."""
