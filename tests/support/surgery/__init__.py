"""A model and its optimizer that are cut up between steps, and what a step must do then.

What is right: the step is that of ``torch.optim`` in float64 on copies of what the parameters,
gradients and ``optimizer.state`` hold at that moment, with the penalty's gradient for the vectors
that the backend was given; or it is refused by a ValueError or RuntimeError that names a parameter
which cannot be used in place, and nothing has changed.
"""
