"""Search over hyperparameters and architectures."""
