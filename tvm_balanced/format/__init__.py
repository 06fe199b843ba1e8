"""Packed formats of weights; no TVM."""
