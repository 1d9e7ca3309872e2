"""The fused head: from hidden states to row statistics and losses; logits never exist whole.

    chunks.py      how many rows, or columns, of logits exist at a time
    head.py        this rank's rows of the head's weight; the matrix products
    call.py        one call: its tensors, its request, its chunk
    wide.py        whether logits are made in fp32
    kept.py        which rows take part in the products, and in which portions
    straight.py    whether an engine's own functions do it all, without logits
    forward.py     partials by chunks of rows, one exchange
    backward.py    gradients from logits that are computed again: by blocks of columns, or of rows
    in_forward.py  a reduced loss and its gradients in one pass, chunk by chunk
    hidden.py      hidden states of a portion, and the sum of their gradient over ranks
    sums.py        where gradients of weight and bias are added up
    checks.py dtensor.py        arguments
    primitive.py compiled.py    autograd, and custom operators

The formulas are those of the logits-level functions, and so are their code: ``passes`` fills
partials and writes gradients, here into a chunk.
"""
