"""Reading checkpoints: safetensors files, their folder, each weight as it is stored, and what was converted."""
