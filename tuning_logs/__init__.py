"""Tuning records shipped with the package, one folder per GPU or CPU (package data)."""

from __future__ import annotations
