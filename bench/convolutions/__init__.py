"""Norms of convolutions as operators: what they are, and what each way to find them costs."""
