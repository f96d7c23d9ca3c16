"""Where a person meets the model: `dsv32 generate`, `dsv32 chat` and `dsv32 doctor`."""
