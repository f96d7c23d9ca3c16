"""The source: safetensors headers, how each weight is stored, and its bytes."""
