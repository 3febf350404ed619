"""Triton kernels, one file per op; imported as `dinov2_fast.kernels`, never as `kernels`."""
