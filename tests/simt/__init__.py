"""The CUDA kernels on a CPU: a host SIMT shim, and a process that runs them under sanitizers."""
