"""One program, any number of ranks: ``@distributed`` finds out which rank this process is, whatever launched it.

    @distributed
    def main(rank: Rank, config: FilterConfig) -> None: ...

    main(config)        # the same call on a laptop, under torchrun, accelerate launch and srun

- ``place``: rank and world size from the environment of the launcher
- ``device``: its GPU, or the CPU, and why not
- ``signals``: SIGTERM and SIGUSR2 become a flag, read at safe boundaries
- ``life``: what a rank tells the job script that started it
- ``watchdog``: a rank that is stuck says where, and ends
- ``peers``: how ranks wait for each other, and learn that one of them failed
- ``output``: what a rank prints never ends it
- ``rank``: what a stage sees of all this
- ``run``: the decorator; how a rank ends, and its exit code

Nothing here imports torch before a device, a barrier, a broadcast or a reduction is asked for.
"""

from pipeline.distributed.entry import distributed
from pipeline.distributed.environment import Place, expand_nodes, find_place
from pipeline.distributed.peers import BarrierTimeout, PeerFailed
from pipeline.distributed.rank import Rank
from pipeline.distributed.signals import (
    EXIT_ENVIRONMENT,
    EXIT_HUNG,
    EXIT_PEER,
    EXIT_STOPPED,
    EXIT_STORAGE,
    Stopped,
    ignore_signals,
)

__all__ = [
    "EXIT_ENVIRONMENT",
    "EXIT_HUNG",
    "EXIT_PEER",
    "EXIT_STOPPED",
    "EXIT_STORAGE",
    "BarrierTimeout",
    "PeerFailed",
    "Place",
    "Rank",
    "Stopped",
    "distributed",
    "expand_nodes",
    "find_place",
    "ignore_signals",
]
