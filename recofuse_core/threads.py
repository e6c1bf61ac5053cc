"""How many threads torch computes with: its own number (one a core, or OMP_NUM_THREADS), or what the process may use.

torch heeds the affinity of a process but not the quota of its cgroup, so importing this module, which `model` does,
lowers its number to that. Another number of threads changes the last bits of a result, which is why it does not follow
the load of a host.
"""

import torch

from recofuse_host.processors import Processors, Threads, decide_threads, read_processors

_TORCHS_OWN = torch.get_num_threads()


def decide(asked: int, torchs_own: int, processors: Processors, num_sharing: int = 1) -> Threads:
    """The number that was asked for, or for 0 torch's own, but no more than a share of what the process may use."""
    threads = decide_threads(asked, processors, num_sharing)
    return threads if asked else Threads(min(torchs_own, threads.count), f"torch's {torchs_own}, {threads.why}")


def use_threads(asked: int = 0, *, num_sharing: int = 1) -> Threads:
    """Let torch compute with so many threads from now on, in this thread and in those started later.

    0: as many as the process may use, divided by the number of processes that share them.
    """
    threads = decide(asked, _TORCHS_OWN, read_processors(), num_sharing)
    if threads.count != torch.get_num_threads():
        torch.set_num_threads(threads.count)
    return threads


use_threads()
