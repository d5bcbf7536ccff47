"""One program, any number of ranks: ``@distributed`` finds out which rank this process is, whatever launched it.

    @distributed
    def main(rank: Rank, config: FilterConfig) -> None: ...

    main(config)        # the same call on a laptop, under torchrun, accelerate launch and srun

- ``environment``: rank and world size, from the launcher's environment variables
- ``device``: the rank's GPU or the CPU, and why a GPU cannot be used
- ``signals``: SIGTERM and SIGUSR2 set a flag, which is read at safe boundaries; exit codes
- ``progress``, ``watchdog``: a rank that is stuck logs where, and ends
- ``peers``: barriers and broadcasts between ranks, and notification of failures
- ``flight``: torch's recording of collectives, written when a rank fails
- ``standard_output``: a log that cannot be written does not end a rank
- ``rank``: the interface of all this for stages
- ``entry``, ``ending``: the decorator, and how a rank ends with which exit code

Nothing here imports torch before a device, a barrier, a broadcast or a reduction is requested.
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
