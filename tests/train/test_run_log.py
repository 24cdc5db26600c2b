import json

from avid_pipeline.train.loss_curve import draw_loss_curve
from avid_pipeline.train.run_log import RunLog, read_metrics


def write(folder, steps, first_step=0):
    with RunLog(folder, 10, first_step) as log:
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
    with RunLog(tmp_path / "run", 10, quiet=True) as log:
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
