import os
import sys

import pytest
from click.testing import CliRunner

from avid_pipeline.shards_spec.cli import main
from avid_pipeline.shards_spec.errors import ShardError
from avid_pipeline.shards_spec.parallel import in_processes, in_threads
from avid_pipeline.shards_spec.reader import open_dataset
from tests import processes

COMMANDS = {
    "info": ["info", "ROOT"],
    "validate": ["validate", "ROOT"],
    "deep": ["validate", "--deep", "ROOT"],
    "preview": ["preview", "ROOT", "--out", "PICTURE"],
    "show": ["show", "ROOT", "0"],
    "find": ["show", "ROOT", "some-key"],
    "stats": ["stats", "ROOT", "--out", "PICTURE"],
    "copy": ["copy", "ROOT", "FOLDER"],
}


def run(command, root, tmp_path, *more):
    places = {"ROOT": str(root), "PICTURE": str(tmp_path / "x.png"), "FOLDER": str(tmp_path / "copy")}
    return CliRunner().invoke(main, [places.get(part, part) for part in COMMANDS[command]] + list(more))


def assert_one_message(result, message):
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_root_that_does_not_exist(command, tmp_path):
    assert_one_message(run(command, tmp_path / "nothing", tmp_path), "nothing: does not exist; give the folder")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_root_without_a_manifest(command, tmp_path):
    assert_one_message(run(command, tmp_path, tmp_path), "manifest.json: does not exist, so this is not a finished")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_manifest_that_is_none(command, tmp_path):
    (tmp_path / "manifest.json").write_text('{"spec_version": 1, "dataset": 5}')
    assert_one_message(run(command, tmp_path, tmp_path), "dataset: Input should be a valid string")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_an_object_store(command, small_dataset, bucket, tmp_path):
    for path in small_dataset.glob("*.*"):
        bucket.open("data").write(path.name, path.read_bytes())
    option = "--source-option" if command == "copy" else "--storage-option"
    result = run(command, f"{bucket.url}/data", tmp_path, *bucket.arguments(option))
    if command == "find":
        assert_one_message(result, "no sample has the key 'some-key'")
    else:
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_is_no_assignment(command, small_dataset, tmp_path):
    result = run(command, small_dataset, tmp_path, "--storage-option", "colour")
    assert result.exit_code == 2
    assert "expected KEY=VALUE, found 'colour'" in result.output


def test_info_counts_subsets(write_dataset, new_sample, tmp_path):
    subsets = {"with-audio": ((0, 1), (2, 3)), "fold1-train": ((0, 1),)}
    samples = [new_sample("a"), new_sample("b", with_audio=False), new_sample("c")]
    root = write_dataset(tmp_path / "root", [samples], modalities=("video",), subsets=subsets)
    output = CliRunner().invoke(main, ["info", str(root)]).output
    lines = [line.split() for line in output.splitlines()]
    assert ["subsets", "fold1-train:", "1", "samples"] in lines
    assert ["with-audio:", "2", "samples"] in lines
    assert "24000 Hz" in output


def test_help_stands_alone():
    for command in ("info", "validate", "preview", "show", "stats", "copy"):
        result = CliRunner().invoke(main, [command, "--help"])
        assert result.exit_code == 0
        assert "--storage-option KEY=VALUE" in result.output


def test_the_command_line_starts_without_decoders_and_pictures():
    code = "import sys, avid_pipeline.shards_spec.cli; print([m for m in ('av', 'matplotlib') if m in sys.modules])"
    assert processes.run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_shards_in_order_from_an_object_store(small_dataset, bucket):
    for path in small_dataset.glob("*.*"):
        bucket.open("data").write(path.name, path.read_bytes())
    local, remote = open_dataset(small_dataset), open_dataset(f"{bucket.url}/data", bucket.options)
    for shard in local.manifest.shards:
        places = list(range(shard.samples))[::-1]
        assert list(remote.read_shard(shard)) == list(local.read_shard(shard))
        assert list(remote.read_shard(shard, places)) == list(local.read_shard(shard))[::-1]


def test_threads_keep_the_order_and_stop_at_an_error():
    assert list(in_threads(lambda item: item * 2, range(100), 8)) == list(range(0, 200, 2))
    started = []

    def fail_at_three(item):
        started.append(item)
        if item == 3:
            raise ShardError("third")
        return item

    with pytest.raises(ShardError, match="third"):
        list(in_threads(fail_at_three, range(10_000), 2))
    assert len(started) < 50


def process_of(item, on_progress):
    on_progress()
    if item == "die":
        os._exit(3)
    return os.getpid(), item


def test_processes_report_progress_and_death():
    steps = []
    done = list(in_processes(process_of, ["a", "b", "c"], 2, lambda: steps.append(1), str))
    assert sorted(item for _, item in done) == ["a", "b", "c"]
    assert os.getpid() not in {number for number, _ in done}
    assert len(steps) == 3
    with pytest.raises(Exception, match=r"a worker process died .* at one of .*die"):
        list(in_processes(process_of, ["die", "a"], 2, lambda: None, str))
