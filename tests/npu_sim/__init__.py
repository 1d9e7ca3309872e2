"""A stand-in for CANN: the real torch_npu package, run on a machine that has no Ascend card.

libraries.py    builds the shared libraries that torch_npu links to, and the environment to run in
cann.c          the runtime: devices whose memory is the host's, streams, events, versions
hccl.c          the collectives, between processes of one machine
device.py       aten for device "npu": every kernel is the CPU's, on the same memory
operators.py    the cross-entropy operators, as strict as their documents
ledger.py       what ran, and the bytes that a card would move for it
site/           how device.py gets into an unchanged program

    python -m tests.npu_sim COMMAND ...

See README.md for what it proves and what it does not.
"""
