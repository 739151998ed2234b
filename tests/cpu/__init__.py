"""The CPU kernels without torch: which thread does what of a launch."""
