"""The formulas in plain PyTorch, and backends that compute them, with one interface."""
