"""The head and its loss together, beside what one would otherwise use."""
