"""Which way and how much scratch are best on a card, and what each kernel of a way takes there."""
