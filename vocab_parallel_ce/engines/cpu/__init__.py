"""The engine of CPU tensors: Numba kernels on a thread pool."""
