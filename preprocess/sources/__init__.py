"""Data set sources: what to convert, in a defined order."""
