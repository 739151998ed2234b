"""The Triton backend: in Triton's interpreter, and compiled for GPUs without one."""
