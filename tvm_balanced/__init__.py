"""tvm-balanced: imported models become libraries whose linear layers run balanced-sparse."""

from tvm_balanced._version import __version__

__all__ = ["__version__"]
