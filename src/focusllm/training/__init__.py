"""Training candidate projections: data, samples, losses, the loop, checkpoints, and what is kept of it."""
