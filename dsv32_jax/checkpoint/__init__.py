"""Converted checkpoints: the files, their manifest, and how they are loaded."""
