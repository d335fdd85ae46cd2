"""The mathematics, as plain PyTorch and as kernels, behind one contract."""
