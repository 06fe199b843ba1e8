"""From scheduled kernels to cubins, and what is read from them."""
