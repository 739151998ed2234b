"""The CUDA kernels, in a shim on the CPU, and compiled by nvcc."""
