"""A converted checkpoint written again: as Hugging Face safetensors for other software, or for another mesh."""
