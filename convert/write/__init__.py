"""Writing a converted checkpoint, part by part, so that a killed job continues."""
