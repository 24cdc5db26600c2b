"""Fine-tuning and linear probes."""
