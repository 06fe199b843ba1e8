"""Operators and models against what else runs them."""
