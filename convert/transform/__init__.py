"""From the weights of the source to the leaves of the model."""
