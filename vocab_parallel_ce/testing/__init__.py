"""Right answers for tests of the loss: an fp64 reference and one rule of tolerance."""
