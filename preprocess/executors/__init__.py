"""Executors: run shard-building tasks somewhere."""
