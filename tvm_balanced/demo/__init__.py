"""The demo: two models from training to a library."""
