"""Source checkpoints: safetensors files, the folder, and each weight as it is stored."""
