"""The machine around the model: files, memory, signals, the compiler, progress."""
