"""Relax passes ("Relay Next": Relay itself left TVM in 0.20), one per file, each an IRModule to an IRModule.

``tvm_balanced/build/pipeline.py`` says in which order they run, and why.
"""

from __future__ import annotations
