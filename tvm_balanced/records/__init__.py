"""Tuning records on disk; knows nothing of TVM."""
