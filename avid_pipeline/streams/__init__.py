"""Streams: who reads what, and when, as a pure function of the manifest."""
