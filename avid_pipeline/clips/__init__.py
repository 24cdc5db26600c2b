"""Clips: from encoded samples to batches of tensors."""
