"""From source weights to the leaves of the model: requantized, cut, stacked."""
