"""A follower sends each step of a run once, whatever a resume makes again."""

import json
import signal
import sys

import pytest

from errors import InputError
from experiments import follow


def test_each_step_is_sent_once_and_the_end_ends_it(tmp_path, monkeypatch, call):
    """Of a run of three steps; each look finds what `looks` writes next."""
    config = {"config": {"num_steps": 3, "eval_data": "x"}, "script": "train", "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows, ended = [], []
    tracker = (lambda row, step: rows.append((step, row)), lambda: ended.append(True))
    monkeypatch.setattr(follow, "tracker", lambda name, run, config: tracker)

    def write(steps: int, *scored: int) -> None:
        row = '{{"step": {0}, "loss": {0}.5, "accuracy": null, "by_decile": {{"weight": []}}}}\n'
        (tmp_path / "metrics.jsonl").write_text("".join(row.format(step) for step in range(steps)) + '{"step"')
        (tmp_path / "evaluation.json").write_text(json.dumps({step: {"greedy": step / 4} for step in scored}))

    looks = iter([(2, 0), (1, 0), (3, 0), (3, 0, 3)])  # a resume has cut the second row, which is then made again
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: write(*next(looks)))
    call(follow, tmp_path, "--to", "trackio")
    steps = [(0, {"loss": 0.5, "heldout_greedy": 0.0}), (1, {"loss": 1.5}), (2, {"loss": 2.5})]
    assert rows == [*steps, (3, {"heldout_greedy": 0.75})] and ended == [True]


def test_ctrl_c_ends_what_was_sent_too(tmp_path, monkeypatch, call):
    config = '{"num_steps": 3, "eval_data": ""}'
    (tmp_path / "config.json").write_text(f'{{"config": {config}, "script": "train", "versions": {{}}}}')
    ended = []
    monkeypatch.setattr(follow, "tracker", lambda *_: (None, lambda: ended.append(True)))
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        call(follow, tmp_path, "--to", "trackio")
    assert ended == [True]


@pytest.mark.parametrize("package", ["trackio", "tensorboard", "wandb"])
def test_a_missing_package_is_one_line(package, tmp_path, monkeypatch, call):
    (tmp_path / "config.json").write_text('{"config": {}, "script": "train", "versions": {}}')
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None)
    for folder, said in ((tmp_path, f"pip install {package}"), (tmp_path / "no", "no run folder")):
        with pytest.raises(InputError, match=said):
            call(follow, folder, "--to", package)
