"""Checks of a machine, or of each rank of a small job, before a real job runs: see launch/doctor.py.

- ``finding``: one thing that was looked at, in plain words, as a line that survives any launcher
- ``machine``: Python, packages, CPUs, memory, limits
- ``gpus``: driver, torch, GPUs against what was given, kernels by running them
- ``filesystem``: the promises that commits need, space, inodes, speed; together: visibility, races, locks
- ``network``: how ranks meet, ports, clocks, all-reduce
- ``hub``: caches of models, and whether the Hub is reached
- ``speed``: decoding, autoencoder, text encoder, and who waits for whom
"""
