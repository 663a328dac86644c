"""The vocabulary and the decisions of PacketStack: pure values and functions, no I/O, no clock, no randomness.

`resources` is what a user writes, `planning` says which engines come, stay and leave, `assignment` which buckets
move, `hashing` and `maglev` are the arithmetic, and `abi` reads the layouts that C and Python share.
"""
