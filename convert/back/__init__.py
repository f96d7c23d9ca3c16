"""A converted checkpoint read back: verified against its source, or laid out for another mesh."""
