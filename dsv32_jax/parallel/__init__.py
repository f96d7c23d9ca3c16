"""Meshes of devices and several processes."""
