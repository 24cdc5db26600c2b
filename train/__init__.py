"""Training: losses, memory bank, trainer, checkpoints."""
