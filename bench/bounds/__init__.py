"""What bounds on sigma do to a small GPT-2: loss, sigma, activations and logits."""
