"""Errors of sigma while networks train."""
