"""The vocabulary and the decisions of PacketStack: pure values and functions, no I/O, no clock, no randomness.

`resources` is what a user writes, `planning` says which buckets move, `reconciling` which engines come and go,
`ownership` is the model of a handover, `hashing` and `maglev` are the arithmetic, and `abi` reads the layouts
that C and Python share.
"""
