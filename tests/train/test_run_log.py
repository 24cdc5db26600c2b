import json

from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.loss_curve import draw_loss_curve
from avid_pipeline.train.run_log import RunLog, log_folder, read_metrics


def write(folder, steps, first_step=0):
    with RunLog(folder) as log:
        log.begin(10, first_step)
        for step in steps:
            log.advance()
            log.metrics(step, 0, {"loss/total": float(step), "clips_per_second": 8.0})


def steps(folder):
    return [entry["step"] for entry in read_metrics(folder)]


def test_entries_come_back(tmp_path, capsys):
    write(tmp_path, [1, 2])
    assert read_metrics(tmp_path)[1] == {"step": 2, "epoch": 0, "loss/total": 2.0, "clips_per_second": 8.0}
    line = capsys.readouterr().out.splitlines()[0]
    assert line == "epoch 1  step 1  total 1  clips_per_second 8"
    assert (tmp_path / "train.log").read_text().splitlines()[0].endswith(line)


def test_a_resumed_run_has_no_step_twice(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], first_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_new_run_begins_anew(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert steps(tmp_path) == [1]


def test_a_line_cut_short_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, [3], first_step=2)
    assert steps(tmp_path) == [1, 2, 3]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_other_ranks_write_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", quiet=True) as log:
        log.begin(10, 0)
        log.say("hello")
        log.advance()
        log.metrics(1, 0, {"loss/total": 1.0})
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_the_loss_curve_is_a_picture(tmp_path):
    assert draw_loss_curve(tmp_path) is None
    write(tmp_path, [1])
    path = draw_loss_curve(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "loss.png.partial").exists()


def test_the_terminal_does_not_show_both_directions(tmp_path, capsys):
    with RunLog(tmp_path) as log:
        log.begin(10, 0)
        log.metrics(1, 0, {"loss/total": 1.0, "loss/video_to_audio": 2.0, "memory/video_drift": 0.5})
    assert capsys.readouterr().out == "epoch 1  step 1  total 1  memory/video_drift 0.5\n"
    assert read_metrics(tmp_path)[0]["loss/video_to_audio"] == 2.0


def test_logs_of_a_run_in_an_object_store_go_there_and_come_back(make_bucket, tmp_path, monkeypatch):
    bucket = make_bucket()
    root = open_storage(f"{bucket.url}/runs/a", options=bucket.options)
    assert log_folder(open_storage(tmp_path)) == tmp_path
    folder = log_folder(root)
    assert not folder.is_absolute()
    assert folder.parts[0] == "avid-train-logs"
    assert len(folder.parts) == 2
    monkeypatch.chdir(tmp_path)
    with RunLog(folder, copy_to=root) as log:
        log.begin(10, 0)
        log.metrics(1, 0, {"loss/total": 1.0})
        log.metrics(2, 0, {"loss/total": 2.0})
        log.publish()
    names = list(root.names())
    assert {"metrics.jsonl", "train.log"} <= set(names)
    assert any(name.startswith("tensorboard/") for name in names)
    elsewhere = tmp_path / "elsewhere"
    with RunLog(elsewhere, copy_to=root) as log:
        log.begin(10, 1)
        log.metrics(2, 0, {"loss/total": 3.0})
    assert [entry["loss/total"] for entry in read_metrics(elsewhere)] == [1.0, 3.0]
    assert "step 1" in (elsewhere / "train.log").read_text()
