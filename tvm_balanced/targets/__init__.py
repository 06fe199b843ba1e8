"""What a target's name means: GPUs, this machine, and the TVM target of each."""
