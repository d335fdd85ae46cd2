"""How matrices lie in memory, byte for byte what the kernels read."""
