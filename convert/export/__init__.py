"""A converted checkpoint as Hugging Face safetensors for other software."""
