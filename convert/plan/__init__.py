"""What a conversion will do, checked before a weight is read."""
