"""Time, memory, bandwidth, collectives: the one place where anything is measured.

machine      what the processor is called, without torch
device       what differs from device to device
clock        points in a device's work, and the seconds between them
passes       forward and backward of a loss once; a copy
in_step      the loss inside a training step
calls        what a call costs beside its work; the first call of a process
host_side    what the host does for a call that a card serves, without a card
memory       peaks
collectives  how many, how long
limits       what memory and arithmetic allow, by reference loops
calibration  what the cost model needs of a CPU
rounds       who is run when; medians
idle         whether the machine is quiet
logits       logits as a layer would have made them
"""
