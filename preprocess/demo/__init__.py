"""Synthetic audio-visual videos with shared hidden causes."""
