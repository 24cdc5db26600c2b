"""One of several processes of test_ranks.py.

Arguments: rank, number of processes, file to meet at, file for rank 0's results, folder for outputs, roots of data with
folds, of training data and of test data, and a model's weights.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from avid_pipeline.collectives import RankGroup
from avid_pipeline.evaluate.checkpoint import open_checkpoint
from avid_pipeline.evaluate.classification import training
from avid_pipeline.evaluate.classification.data import Task, open_parts
from avid_pipeline.evaluate.classification.finetune import Finetuning, run_finetune
from avid_pipeline.evaluate.classification.linear import run_linear
from avid_pipeline.evaluate.classification.testing import classify_clips
from avid_pipeline.evaluate.data import open_fold
from tests.evaluate.classification.labelled import finetune_config, linear_config, quiet, storage

# In float32, rounding decides which of two nearly equal values ReLU and max pooling let through, and that grows.
EXACT = {"compute": {"precision": "float64"}, "epochs": 1}
FINETUNE = finetune_config(classifier_epochs=1, **EXACT)
LINEAR = linear_config(modality="audio", **EXACT)


def record_steps(group: RankGroup) -> list[torch.Tensor]:
    """Sums over ranks of what every step adds up, as training goes on."""
    steps: list[torch.Tensor] = []
    step = training._step

    def recording(*arguments: Any) -> torch.Tensor:
        sums = step(*arguments)
        steps.append(group.all_reduce_sum(sums))
        return sums

    training._step = recording
    return steps


def evaluate(group: RankGroup, output: Path, folds: str, train: str, test: str, weights: str) -> dict[str, Any]:
    """Steps and tables of a fine-tuning and of linear probes, with and without cache, and a test of fixed weights."""
    evaluated, results = open_checkpoint(weights), {}
    fold, splits = open_fold(folds, 1), open_parts(train, test, None)
    steps = record_steps(group)
    runs = {
        "finetune": lambda folder: run_finetune(FINETUNE, evaluated, *fold, folder, group, say=quiet),
        "linear": lambda folder: run_linear(LINEAR, evaluated, *splits, folder, group, say=quiet),
        "cached": lambda folder: run_linear(LINEAR, evaluated, *splits, folder, group, say=quiet, cache_features=True),
    }
    for name, run in runs.items():
        steps.clear()
        found = run(storage(output / name))
        results[name] = {"steps": torch.stack(steps), "results": found.model_dump_json()}
    task = Task(*fold, "video", FINETUNE, None, quiet)
    learner = Finetuning(FINETUNE, evaluated.model.video_model, 3, 4, group)
    outcome = classify_clips(task, learner.names, learner.classify, 3, group)
    results["outcome"] = dict(vars(outcome))
    own = [block.instances for block in task.test_blocks(3, group)]
    results["shares"] = group.gather_objects([int(instance) for block in own for instance in block])
    return results


def main() -> None:
    rank, size, meeting_file, result_file, output, *places = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    results = evaluate(RankGroup(), Path(output), *places)
    of_ranks: list[Any] = [None] * size
    dist.all_gather_object(of_ranks, {name: results[name]["results"] for name in ("finetune", "linear", "cached")})
    if rank == 0:
        torch.save(results | {"of_ranks": of_ranks}, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
