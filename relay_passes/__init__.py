"""Relax passes ("Relay Next": Relay itself left TVM in 0.20), one per file."""

from __future__ import annotations
