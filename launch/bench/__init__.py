"""The loss beside what one would otherwise use: time, memory, exactness."""
