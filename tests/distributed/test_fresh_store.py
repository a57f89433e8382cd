"""Ranks that meet again in a store which still holds the keys of their dead predecessors."""

import datetime
import threading

import pytest
import torch.distributed as dist

from moco.fresh_store import fresh_store, hello_key

PATIENCE = datetime.timedelta(seconds=20)


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(store):
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


def meet(store, order, delay_s=0.05):
    """Ranks come in the given order; returns rank -> what it finds under a key of rank 0's."""
    found, threads = {}, []

    def come(rank, own):
        mine = fresh_store(own, rank, len(order), PATIENCE)
        mine.set(f"address/{rank}", f"{order}{rank}")
        found[rank] = mine.get("address/0").decode()

    for rank in order:
        threads.append(threading.Thread(target=come, args=(rank, client(store))))
        threads[-1].start()
        threads[-1].join(delay_s)  # the later ones come clearly later
    for thread in threads:
        thread.join(20)
    return found


@pytest.mark.parametrize("again", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_restarted_group_never_reads_the_dead_ones_keys(store, again):
    first = (0, 2, 1)
    assert meet(store, first) == {rank: f"{first}0" for rank in range(3)}
    assert meet(store, again) == {rank: f"{again}0" for rank in range(3)}
    # Fewer processes, as after a machine is gone, and more again.
    assert meet(store, (1, 0)) == {0: "(1, 0)0", 1: "(1, 0)0"}
    assert meet(store, first) == {rank: f"{first}0" for rank in range(3)}


def test_control_in_the_store_itself_the_dead_ones_keys_are_read(store):
    client(store).set("address/0", "of the dead")
    assert client(store).get("address/0") == b"of the dead"


def test_a_start_that_was_cut_in_the_middle_does_not_disturb_the_next(store):
    client(store).set(hello_key(1), "nonce of a process that died before its answer")
    client(store).set(hello_key(0), "another")
    assert meet(store, (0, 1)) == {0: "(0, 1)0", 1: "(0, 1)0"}


@pytest.mark.parametrize("rank, message", [(0, r"ranks \[1\]"), (1, None)])
def test_a_rank_that_does_not_come_is_an_error_in_time(store, rank, message):
    with pytest.raises(RuntimeError, match=message):
        fresh_store(client(store), rank, 2, datetime.timedelta(seconds=0.3))
