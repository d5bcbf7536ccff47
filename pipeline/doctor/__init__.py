"""Checks a machine, or each rank of a small job, before a real job runs: see launch/doctor.py.

- ``finding``: the result of one check, as a line that passes through any launcher
- ``machine``: Python, packages, CPUs, memory, limits
- ``gpus``: driver, torch, GPUs compared with those allocated, kernels that are run
- ``filesystem``: what commits need, space, inodes, speed; from several ranks: visibility, races, locks
- ``network``: connections to rank 0, ports, clocks, all-reduce
- ``hub_access``: caches of models, and whether the Hub can be reached
- ``speed``: decoding, autoencoder, text encoder, and which of them waits for which
"""
