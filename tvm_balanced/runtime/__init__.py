"""Loading a compiled library and calling it."""
