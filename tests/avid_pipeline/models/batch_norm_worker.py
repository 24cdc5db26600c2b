"""One of four processes of test_batch_norm.py: runs nets on 1 to 4 of them and records what must be equal.

Arguments: rank, number of processes, file to meet at, file for rank 0's results.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from test_batch_norm import CLIPS, GROUPS, batches, small_net  # beside this script
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.models.batch_norm import averaged_batch_norm, averaged_statistics, group_batch_norms
from avid_pipeline.models.synchronised_norm import group_statistics, normalise_together

TRAINING_CLIPS = 8  # With 4, the last batch norms see 4 values, and amplify rounding in torch's own too.
STEPS = {"sgd": 8, "adam": 8}


def run_small(
    group: dist.ProcessGroup | None,
    clips_per_group: int | None = None,
    *,
    dims: int = 3,
    dtype: torch.dtype = torch.float64,
    memory_format: torch.memory_format = torch.contiguous_format,
    autocast: bool = False,
) -> dict[str, Any]:
    """Two forward and backward passes; everything of all ranks, in the order of clips."""
    ranks = RankGroup(group)
    net = small_net(dims=dims, dtype=dtype)
    names = list(net.state_dict())
    group_batch_norms(net, clips_per_group, CLIPS // ranks.size, group)
    mine = slice(ranks.rank * CLIPS // ranks.size, (ranks.rank + 1) * CLIPS // ranks.size)
    outputs, input_gradients, kept_format = [], [], True
    for batch, gradient in zip(*batches(dims, dtype), strict=True):
        clips = batch[mine].contiguous(memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = net(clips)
        kept_format &= output.is_contiguous(memory_format=memory_format)
        output.backward(gradient[mine].to(output.dtype))
        outputs.append(ranks.all_gather(output.detach()))
        assert clips.grad is not None
        input_gradients.append(ranks.all_gather(clips.grad.contiguous()))
    with torch.no_grad():
        without_gradients = net(batches(dims, dtype)[0][0][mine].contiguous(memory_format=memory_format))
    gradients = {name: ranks.all_reduce_sum(p.grad) for name, p in net.named_parameters() if p.grad is not None}
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with averaged_batch_norm(net, ranks):
        evaluated = ranks.all_gather(net.eval()(batches(dims, dtype)[0][0][mine]).detach())
        inside = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    averaged = averaged_statistics(net, ranks)
    return {
        "outputs": torch.stack(outputs),
        "input gradients": torch.stack(input_gradients),
        "without gradients": ranks.all_gather(without_gradients),
        "gradients": gradients,
        "evaluated": evaluated,
        "state": averaged,
        "of ranks": ranks.gather_objects({name: averaged[name] for name in names}),
        "own": ranks.gather_objects(own),
        "inside": inside,
        "restored": all(torch.equal(own[name], tensor) for name, tensor in net.state_dict().items()),
        "names kept": list(net.state_dict()) == names == list(averaged),
        "format kept": kept_format,
    }


def clips_of_step(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Videos and sounds as unlike each other as real ones, with noise as maxima must not tie; embeddings to learn."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(TRAINING_CLIPS, *shape, generator=generator, dtype=torch.float64)

    video = nn.functional.interpolate(draw(3, 2, 3, 3), (4, 32, 32), mode="trilinear")
    audio = nn.functional.interpolate(draw(1, 4, 6), (30, 257), mode="bilinear")
    target = nn.functional.normalize(draw(8), dim=1)
    return video + 0.1 * draw(3, 4, 32, 32), audio + 0.1 * draw(1, 30, 257), target


def train(group: dist.ProcessGroup, optimizer: str, dtype: torch.dtype) -> dict[str, Any]:
    ranks = RankGroup(group)
    model = AVModel(10, (16, 8), torch.Generator().manual_seed(0)).to(dtype)
    group_batch_norms(model, None, TRAINING_CLIPS // ranks.size, group)
    network = DistributedDataParallel(model, process_group=group, broadcast_buffers=False, bucket_cap_mb=1)
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    stepper = kind(model.parameters(), lr={"sgd": 0.01, "adam": 5e-4}[optimizer])
    mine = slice(ranks.rank * TRAINING_CLIPS // ranks.size, (ranks.rank + 1) * TRAINING_CLIPS // ranks.size)
    losses = []
    for step in range(STEPS[optimizer]):
        video, audio, target = (clips[mine].to(dtype) for clips in clips_of_step(step % 4))
        embeddings = (nn.functional.normalize(embedding, dim=1) for embedding in network(video, audio))
        loss = sum(((embedding - target).square().mean() for embedding in embeddings), torch.zeros(()))
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(float(ranks.all_reduce_sum(loss.detach()) / ranks.size))
    return {"losses": losses, "state": averaged_statistics(model, ranks)}


def check_gradients() -> list[str]:
    """Numerical differences of all four processes' outputs against backward: the whole group is one function."""
    generator = torch.Generator().manual_seed(5)
    shape = (dist.get_world_size(), 2, 3, 2, 2)
    everything = torch.randn(shape, generator=generator, dtype=torch.float64)
    seen = torch.randn(shape, generator=generator, dtype=torch.float64)
    affine = [torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    group = dist.group.WORLD
    assert group is not None
    rank = dist.get_rank()

    def loss(clips: Tensor) -> Tensor:
        statistics = group_statistics(clips, group)
        return (normalise_together(clips, *affine, *statistics, 1e-3, group) * seen[rank]).sin().sum()

    clips = everything[rank].clone().requires_grad_()
    loss(clips).backward()  # type: ignore[no-untyped-call]
    assert clips.grad is not None
    gradients = torch.stack(gather(clips.grad))
    problems = []
    for place in range(0, everything.numel(), 3):
        values = []
        for step in (1e-5, -1e-5):
            moved = everything.clone()
            moved.view(-1)[place] += step
            with torch.no_grad():
                total = loss(moved[rank])
            dist.all_reduce(total)
            values.append(float(total))
        found, expected = float(gradients.view(-1)[place]), (values[0] - values[1]) / 2e-5
        if abs(found - expected) > 1e-7 * max(1.0, abs(expected)):
            problems.append(f"{place}: {found} is not {expected}")
    return problems


def compiled_equals_plain() -> bool:
    outputs = []
    for compiled in (False, True):
        net: Any = group_batch_norms(small_net(), None, CLIPS // 4)
        run = torch.compile(net, backend="aot_eager") if compiled else net
        clips = batches(3, torch.float64)[0][0][: CLIPS // 4].requires_grad_()
        output = run(clips)
        output.square().sum().backward()
        outputs += [output.detach(), clips.grad]
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(outputs[:2], outputs[2:], strict=True))


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (ConfigError, ValueError) as error:
        return str(error)
    return "no error"


def copy_still_works() -> bool:
    net = group_batch_norms(small_net(), None, 3)
    clips = batches(3, torch.float64)[0][0][:3]
    return torch.equal(copy.deepcopy(net)(clips), net(clips))


def of_all_ranks() -> dict[str, Any]:
    """What the ranks that are there compute."""
    results: dict[str, Any] = {}
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    for clips_per_group in GROUPS[size]:
        results[f"{clips_per_group} {size}"] = run_small(group, clips_per_group)
    channels_last = {2: torch.channels_last, 3: torch.channels_last_3d}
    for dims in (2, 3):
        for clips_per_group in [clips for clips in (None, 3) if clips in GROUPS[size]]:
            kind = f"{dims}d {clips_per_group} {size}"
            settings: dict[str, Any] = {"dims": dims, "dtype": torch.float32}
            results[f"single {kind}"] = run_small(group, clips_per_group, **settings)
            settings["memory_format"] = channels_last[dims]
            results[f"channels last {kind}"] = run_small(group, clips_per_group, **settings)
            results[f"autocast {kind}"] = run_small(group, clips_per_group, **settings, autocast=True)
    for optimizer in STEPS:
        if size != 3:
            results[f"{optimizer} {size}"] = train(group, optimizer, torch.float64)
    if size == 4:
        results["gradient problems"] = gather(check_gradients())
        results["compiled"] = gather(compiled_equals_plain())
        results["copied"] = gather(copy_still_works())
        results["five"] = gather(error_of(lambda: group_batch_norms(small_net(), 5, 6)))
        results["three ranks of four"] = gather(error_of(lambda: group_batch_norms(small_net(), 18, 6)))
        results["unequal"] = gather(error_of(lambda: group_batch_norms(small_net(), 6, 6 + rank % 2)))
        grouped = group_batch_norms(small_net(), None, 2)
        results["other batch"] = gather(error_of(lambda: grouped(batches(3, torch.float64)[0][0])))
        single = group_batch_norms(nn.Sequential(nn.BatchNorm2d(3)), 1, 2)
        results["one value"] = gather(error_of(lambda: single(torch.randn(2, 3, 1, 1))))
    return results


def main() -> None:
    rank, meeting_file, result_file = int(sys.argv[1]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for group_size in GROUPS:
        if rank < group_size:
            meeting = f"file://{meeting_file}-{group_size}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=group_size)
            results |= of_all_ranks()
            dist.barrier()
            dist.destroy_process_group()
    if rank == 0:
        torch.save(results, result_file)


if __name__ == "__main__":
    main()
