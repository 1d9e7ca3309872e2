"""Time, memory, bandwidth, collectives: the one place where anything is measured."""
