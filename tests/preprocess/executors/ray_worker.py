"""Jobs on Ray, in a process of their own: where Ray loses its head node, it ends the process that uses it.

Arguments: what to do, folder for the results, and the trees of sources. Prints a line of JSON for every job.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avid_pipeline.errors import AvidPipelineError
from avid_pipeline.preprocess.executors import ray as ray_module
from avid_pipeline.preprocess.executors.ray import RayExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from tests.preprocess.executors.conftest import SMALL, TRIES, Killer, make_tasks
from tests.processes import descendants, processes, wait_until


def report(job: str, **results: Any) -> None:
    print(json.dumps({"job": job, **results}), flush=True)


def error_of(action: Callable[[], object]) -> list[str]:
    """Class and text of the error that an action must raise."""
    try:
        action()
    except AvidPipelineError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def convert(tree: Path, root: Path, executor: RayExecutor, on_source: Callable[[], object]) -> None:
    run_job(list_kinetics(tree), SMALL, str(root), executor, on_source=on_source)


def ray_s_own(out: Path, tree: Path) -> None:
    """A Ray that is started for the job, and ended with it."""
    count: list[int] = []
    os.chdir(out)
    convert(tree, out / "own", RayExecutor(None, 2), lambda: count.append(1))
    wait_until(lambda: not [pid for pid in descendants(os.getpid()) if "ray" in processes().get(pid, (0, ""))[1]])
    report("own", sources=len(count))


def in_one_ray(out: Path, tree: Path, slow_tree: Path) -> None:
    """Several jobs of a program that is connected to Ray already."""
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    for attempt in range(TRIES):
        count: list[int] = []
        with Killer(slow_tree, lambda count=count: len(count) > 0, most=1) as killer:
            convert(slow_tree, out / f"killed-{attempt}", RayExecutor(None, 2), lambda count=count: count.append(1))
        if killer.killed:
            break
    report("killed", root=f"killed-{attempt}", sources=len(count), killed=len(killer.killed))

    (out / "blocked").mkdir()
    tasks = make_tasks(tree, out / "blocked")
    (out / "blocked" / "_progress").write_text("a file where a folder must be")
    report("blocked", error=error_of(lambda: list(RayExecutor(None, 2).run(tasks, lambda: None))))

    ray_module.MOST_RETRIES = 1
    for attempt in range(TRIES):
        tasks = make_tasks(slow_tree, out / f"dies-{attempt}")
        with Killer(slow_tree, lambda: True, most=20) as killer:
            error = error_of(lambda tasks=tasks: list(RayExecutor(None, 1).run(tasks[:1], lambda: None)))
        if len(killer.killed) > 1:
            break
    report("dies", error=error, killed=len(killer.killed))
    report("still connected", connected=ray.is_initialized())


def lost_node(out: Path, slow_tree: Path) -> None:
    """The driver is on one node; the other is killed while it builds a shard."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1)]
    count: list[int] = []

    def on_source() -> None:
        count.append(1)
        if nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    convert(slow_tree, out / "lost", RayExecutor(cluster.address), on_source)
    report("lost", sources=len(count), left=len(nodes))


if __name__ == "__main__":
    {"own": ray_s_own, "one": in_one_ray, "lost": lost_node}[sys.argv[1]](*map(Path, sys.argv[2:]))
