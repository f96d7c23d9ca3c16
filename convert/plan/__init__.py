"""The plan of a conversion, checked against the machine, before a weight is read."""
