"""Triton kernels for all parameters of a plan: two launches per step, or a few more."""
