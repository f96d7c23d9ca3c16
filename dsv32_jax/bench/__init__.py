"""Measurements on the machine at hand, each beside what the same machine does at best."""
