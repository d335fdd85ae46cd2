"""Shared by suites and reports: contenders, models, and timing."""
