"""The contract between those who write shards and those who read them. See SPEC.md."""
