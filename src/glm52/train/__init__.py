"""Learning: data, losses, optimizers, the training loop and its command."""
