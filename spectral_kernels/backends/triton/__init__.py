"""Triton kernels for all matrices and vectors of a plan: two launches per step, or a few."""
