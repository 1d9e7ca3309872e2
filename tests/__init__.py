"""The tests of every folder of the sources, and what must be said before torch is loaded."""

import os

# Files run side by side, and several ranks in each: a thread of OpenMP that spins while it waits
# takes the core from the one it waits for, and a test of 7 s of work was seen to take 30.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
