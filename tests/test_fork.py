"""What a fork does to try an idea of its own: name it in one place, and every script knows it.

A new weighting by position is one line of weighting.SCHEDULES, a method one row of loss.METHODS.
"""

import json
import sys

import pytest

import loss
import train
import weighting
from loss import Method, clipped_divergence, token_mean


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
