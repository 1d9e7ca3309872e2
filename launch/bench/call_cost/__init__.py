"""What a call costs before the first logit."""
