"""Converted checkpoints on disk: arrays, manifest, integrity."""
