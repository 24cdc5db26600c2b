"""Evaluation of what was learned."""
