"""The fused head: from hidden states to row statistics and losses; logits never exist whole.

    chunks.py      how many rows, or columns, of logits exist at a time
    head.py        this rank's rows of the head's weight; the matrix products
    call.py        one call: its tensors, its request, its chunk
    kept.py        which rows take part in the products, and in which portions
    forward.py     partials by chunks of rows, one exchange
    backward.py    gradients from logits that are computed again: by blocks of columns, or of rows
    sums.py        where gradients of weight and hidden states are added up
    checks.py      arguments
    primitive.py   autograd

The formulas are those of the logits-level functions, and so are their code: ``passes`` fills
partials and writes gradients, here into a chunk.
"""
