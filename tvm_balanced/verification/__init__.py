"""Is what was compiled right: libraries, kernels, and how far results may be off."""
