"""Pre-training: loss, step, balance, checkpoints, and the Ray Train shell."""
