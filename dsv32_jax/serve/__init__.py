"""The model behind the interfaces that people's tools speak: HTTP as OpenAI and Anthropic define it."""
