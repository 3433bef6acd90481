"""Data sets: where they come from, how their files are read, and their batches on the device."""

from tasks.data.library import Library

__all__ = ["Library"]
