"""The conversion itself: read, cut, hash, write, note."""
