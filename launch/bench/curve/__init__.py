"""Time against rows and columns: a table, and a picture of it."""
