"""Which parameters of a model are regularized, and how each is viewed."""
