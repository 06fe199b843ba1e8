"""What a compiled library holds on disk, ``model.tvmb/``."""
