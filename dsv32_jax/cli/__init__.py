"""The command `dsv32`."""
