"""From requests to tokens: prefill, decode, sampling, sessions."""
