"""The operation itself: values, gradients, lists, bits, bad input, backends."""
