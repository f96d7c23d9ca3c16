"""The machine around the model: files, memory, signals, compiled programs, progress."""
