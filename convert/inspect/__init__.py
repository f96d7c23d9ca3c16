"""Contents of a checkpoint folder, in Hugging Face layout or converted."""
