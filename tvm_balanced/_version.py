"""The package's version, on its own so that setup.cfg can read it without importing anything."""

__version__ = "0.1.0"
