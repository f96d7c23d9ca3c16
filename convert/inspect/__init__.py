"""What a folder of either kind holds."""
