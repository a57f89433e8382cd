"""Keys of this start's own, where torchrun keeps one store over all its restarts.

torchrun's workers meet in a store that its agent serves, and after `--max-restarts` put the group
up again they meet in the same one, keys of the dead group included (pytorch issue 135712): a
process that comes first connects to addresses at which nobody listens any more. Restart counts do
not help, each machine has its own. So the ranks first agree on a word that no earlier start knew,
and from then on use only keys below it.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.01


def fresh_store(
    store: dist.Store, rank: int, world_size: int, patience: timedelta
) -> dist.PrefixStore:
    """The part of `store` that only this start's ranks know.

    Raises: RuntimeError where a rank does not come in time.
    """
    return dist.PrefixStore(_agree_on_word(store, rank, world_size, patience), store)


def hello_key(rank: int) -> str:
    """Set in the store as soon as a rank, of this or of an earlier start, has come."""
    return f"moco/hello/{rank}"


def _agree_on_word(store: dist.Store, rank: int, world_size: int, patience: timedelta) -> str:
    """A word drawn by rank 0, known to all ranks when this returns.

    Each other rank leaves a nonce. Rank 0 answers below the nonce, so what was answered to an
    earlier process is never read, and goes on answering until all have thanked it below the word.
    """
    own = uuid.uuid4().hex
    store.set(hello_key(rank), own)
    if rank > 0:
        answer = f"moco/answer/{own}"
        store.wait([answer], patience)
        word = store.get(answer).decode()
        store.set(f"moco/thanks/{word}/{rank}", "")
        return word
    deadline, waiting = time.monotonic() + patience.total_seconds(), set(range(1, world_size))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"moco/thanks/{own}/{other}"]):
                waiting.remove(other)
            elif store.check([hello_key(other)]):
                store.set(f"moco/answer/{store.get(hello_key(other)).decode()}", own)
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer of ranks {sorted(waiting)}")
        time.sleep(_POLL_S)
    return own
