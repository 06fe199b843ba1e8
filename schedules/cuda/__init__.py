"""Schedules for CUDA: a kernel, its tiles and its cost model side by side."""
