from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from avid_pipeline.errors import AvidPipelineError
from avid_pipeline.process_group import agree_on_round


@pytest.fixture
def connect():
    """Makes clients of one store, as workers of several rounds would be."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30))


def meet(connect, ranks, patience=30.0, world_size=3):
    with ThreadPoolExecutor(len(ranks)) as pool:
        joined = [pool.submit(agree_on_round, connect(), rank, world_size, patience) for rank in ranks]
        return [future.result() for future in joined]


def test_every_round_has_a_name_of_its_own(connect):
    names = []
    for _ in range(5):
        found = meet(connect, [2, 1, 0])
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 5


def test_a_round_that_was_broken_off_leaves_no_harm(connect):
    meet(connect, [0, 1, 2])
    with pytest.raises(AvidPipelineError, match="did not"):
        meet(connect, [0, 1], patience=0.3)
    with pytest.raises(AvidPipelineError, match="rank 0 did not come"):
        meet(connect, [1, 2], patience=0.3)
    assert len(set(meet(connect, [1, 0, 2]))) == 1


def test_one_process_alone(connect):
    assert meet(connect, [0], world_size=1)
