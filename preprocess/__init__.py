"""From raw videos to shards."""
