"""What a fork does to try an idea of its own: name it in one place, and every script knows it.

A new weighting by position is one line of weighting.SCHEDULES. A method is one row of loss.METHODS and, here, the
function of its weight. Both then train and stand in the study's table without another change.
"""

import json
import sys

import pytest
import torch

import loss
import train
import weighting
from experiments.study.report import write_report
from experiments.study.run import Grid, run_grid
from loss import LossOptions, Method, TokenScores, clipped_divergence, token_mean


def middle(r: torch.Tensor) -> torch.Tensor:
    """A schedule of position: only the middle half of a solution counts."""
    return ((r > 0.25) & (r < 0.75)).float()


def confidence(
    r_M: torch.Tensor, scores: TokenScores, lengths: list[int], step: int, options: LossOptions
) -> torch.Tensor:
    """A weight of the teacher's entropy instead of the position: exp(-H(p_T))."""
    return (-scores.teacher_entropy).exp()


def test_a_new_weighting_trains_and_stands_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setitem(weighting.SCHEDULES, "middle", middle)
    monkeypatch.setitem(loss.METHODS, "confident", Method(clipped_divergence, confidence, token_mean))

    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"problem": "2+2+2+2+2", "answer": "10"}) + "\n")
    common = {"num_steps": 2, "batch_size": 4, "eval_data": str(held_out), "device": "cpu"}
    rows = {
        "OPSD": {"method": "opsd"},
        "middle": {"method": "pwopsd", "schedule": "middle"},
        "confident": {"method": "confident"},
    }
    grid = Grid(common, [0], rows)
    report = write_report(grid, run_grid(grid, tmp_path, workers=1), tmp_path)

    for row in rows:
        assert f"| {row} |" in report
        (run,) = (path for path in (tmp_path / "runs").glob(f"{row.lower()}-seed0-*") if path.is_dir())
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(steps) == 2
        weights = steps[0]["by_decile"]["weight"]
        if row == "middle":
            assert weights[0] == 0.0
            assert weights[4] == 1.0
        if row == "confident":
            assert 0.0 < steps[0]["weight"] < 1.0


def test_a_fork_that_wraps_a_clipping_loss_logs_what_is_clipped(monkeypatch, tmp_path):
    """`clips` says so, whatever function stands in the row; without it nothing is logged as clipped."""

    def half(student_logp_MV, teacher_logp_MV, ids_M, options):
        return 0.5 * clipped_divergence(student_logp_MV, teacher_logp_MV, ids_M, options)

    monkeypatch.setitem(loss.METHODS, "half", Method(half, "late_half", token_mean, clips=True))
    monkeypatch.setitem(loss.METHODS, "silent", Method(half, "late_half", token_mean))
    monkeypatch.setitem(weighting.SCHEDULES, "late_half", lambda r: (r >= 0.5).float())
    steps = {}
    for method in ("half", "silent", "opsd"):
        run = tmp_path / method
        flags = ["--num_steps", "1", "--batch_size", "4", "--eval_data", "", "--device", "cpu", "--tau_clip", "0.05"]
        monkeypatch.setattr(sys, "argv", ["train.py", "--method", method, *flags, "--output_dir", str(run)])
        train.main()
        steps[method] = json.loads((run / "metrics.jsonl").read_text())
    half_step, silent, opsd = steps.values()
    assert half_step["clipped_mass"] == opsd["clipped_mass"] > 0.0 == silent["clipped_mass"]
    assert half_step["loss"] == silent["loss"]
    assert half_step["divergence"] == pytest.approx(0.5 * opsd["divergence"], rel=1e-5)
    assert half_step["by_decile"]["weight"] == [0.0] * 5 + [1.0] * 5
