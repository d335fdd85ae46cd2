"""The engine of a step: buckets, power iterations, and the three ways to add the penalty."""
