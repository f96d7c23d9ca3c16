"""Reading a converted checkpoint back, and comparing it with its source."""
