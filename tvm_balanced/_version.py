"""The package's version, on its own so that setup.cfg can read it without importing anything."""

__version__ = "0.2.0.dev0"
