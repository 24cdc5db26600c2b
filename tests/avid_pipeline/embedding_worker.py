"""One of four processes of test_embedding.py: embeds on 1 to 4 of them and records what must be equal.

Arguments: rank, number of processes, file to meet at, file for rank 0's results, root of the data.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.collectives import RankGroup
from avid_pipeline.embedding import Embeddings, embed_dataset
from avid_pipeline.models import AVModel
from avid_pipeline.shards_spec.reader import open_dataset

SUBSET = [7, 2, 5]


def plain(embeddings: Embeddings) -> dict[str, Any]:
    return dict(vars(embeddings))


def main() -> None:
    rank, size, meeting_file, result_file, root = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    model = AVModel(10, (16, 8), torch.Generator().manual_seed(0))
    reader, clip = open_dataset(root), ClipSettings(crop_size=16, audio_seconds=0.3)
    results: dict[str, Any] = {}

    def embed(group: RankGroup | None, **changes: Any) -> dict[str, Any]:
        settings = {"clips_per_instance": 2, "batch_size": 5, "workers": 1} | changes
        return plain(embed_dataset(model, reader, clip, group=group, **settings))

    for world_size in range(1, size + 1):
        process_group = dist.new_group(list(range(world_size)))
        if rank >= world_size:
            continue
        assert isinstance(process_group, dist.ProcessGroup)
        group = RankGroup(process_group)
        everything, some = embed(group), embed(group, instances=SUBSET)
        own = embed(group, instances=SUBSET, gather=False)
        of_ranks: list[Any] = [None] * world_size
        dist.all_gather_object(of_ranks, {"all": everything, "some": some, "own": own}, group=process_group)
        results[f"{world_size}"] = of_ranks
    # None is this process alone, whatever process group is up.
    results["alone"] = embed(None)
    if rank == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
