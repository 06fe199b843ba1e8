"""Which weights are kept, and what the others' absence costs."""
