"""Which layers run sparse, and why."""
