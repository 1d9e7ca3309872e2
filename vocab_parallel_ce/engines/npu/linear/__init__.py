"""CANN's fused operators of a head and its loss, for shards of a vocabulary.

    operators.py     their names, and how they are called
    functions.py     what the engine offers: ``contract.LinearFunctions``
    passes.py        statistics and gradients straight from hidden states, made of the operators
    corrections.py   what they lack: smoothing, and another coefficient for the target
    choice.py        whether they serve a call: VOCAB_PARALLEL_CE_NPU_LINEAR, shapes, and a probe
    probe.py         whether they are right on this device

None was ever run on a card: they are tested over a stand-in for CANN.
"""
