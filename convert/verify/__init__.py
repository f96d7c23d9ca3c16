"""Proving that a converted checkpoint is undamaged and lossless."""
