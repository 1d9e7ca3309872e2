"""What an owner of a card runs first: what is here, is it right, how fast."""
