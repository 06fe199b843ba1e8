"""Kernels with 8-bit integer weights and activations for llvm targets, written out as vector TensorIR."""
