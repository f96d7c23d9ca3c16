"""DeepSeek-V3.2 as in the papers: cache, attention, experts, blocks, the model."""
