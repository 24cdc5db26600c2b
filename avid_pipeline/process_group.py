"""Joining the process group that torchrun or a scheduler started, also after torchrun has restarted its workers."""

import json
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from avid_pipeline.errors import AvidPipelineError

__all__ = ["agree_on_round", "in_process_group", "join_process_group"]

_PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 0.05


def in_process_group() -> bool:
    """Whether this process was started as one of several ranks."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def join_process_group() -> None:
    """Make the default process group: NCCL and gloo with GPUs, gloo without.

    Raises:
        AvidPipelineError: other ranks did not come.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Gloo beside it: numbers on the CPU (has anybody received a SIGTERM?) need not wait for the GPU.
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world_size = next(rendezvous("env://"))
    # torchrun lets restarted workers meet in the store of those before them, where they would find the addresses of
    # dead processes. A name of this round's own keeps them apart.
    this_round = agree_on_round(store, rank, world_size)
    dist.init_process_group(backend, store=PrefixStore(this_round, store), rank=rank, world_size=world_size)


def agree_on_round(store: Store, rank: int, world_size: int, patience: float = _PATIENCE_SECONDS) -> str:
    """A name that this round's ranks have in common, and no round before it, in a store that may hold its traces.

    Rank 0 makes up the name; the others answer under it, each with a name of its own; and what rank 0 confirms is a
    list of these, so that nobody takes an old round's name for this one's.

    Args:
        store: shared by all ranks, and perhaps by workers that are gone.
        rank: of this process.
        world_size: number of ranks.
        patience: seconds to wait for the others.

    Raises:
        AvidPipelineError: they did not come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + patience
    if rank == 0:
        store.set("avid-pipeline/round", own)
        answers = [f"avid-pipeline/{own}/{other}" for other in range(1, world_size)]
        if answers:
            _wait(store, answers, deadline)
        store.set(f"avid-pipeline/{own}/confirmed", json.dumps([store.get(answer).decode() for answer in answers]))
        return own
    while True:
        _wait(store, ["avid-pipeline/round"], deadline)
        named = str(store.get("avid-pipeline/round").decode())
        store.set(f"avid-pipeline/{named}/{rank}", own)
        confirmed = f"avid-pipeline/{named}/confirmed"
        if store.check([confirmed]) and own in json.loads(store.get(confirmed)):
            return named
        if time.monotonic() > deadline:
            raise AvidPipelineError(f"rank {rank}: rank 0 did not come within {patience:g} s; look at its output")
        time.sleep(_POLL_SECONDS)


def _wait(store: Store, keys: list[str], deadline: float) -> None:
    seconds = max(deadline - time.monotonic(), 0.001)
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:
        raise AvidPipelineError(f"ranks did not meet in time; look at the output of the others: {error}") from error
