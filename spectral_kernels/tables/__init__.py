"""Plans and states, and their tables in the binary format that kernels read."""
