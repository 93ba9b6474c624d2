"""Triton kernels, tensors in and tensors out; installed as `lavish_fast.kernels`."""
