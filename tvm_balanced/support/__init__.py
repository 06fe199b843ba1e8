"""What every part uses and no part owns: files, tensors, optional libraries, provenance."""
