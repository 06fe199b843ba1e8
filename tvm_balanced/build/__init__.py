"""From a model and its options to a library."""
