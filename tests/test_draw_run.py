"""Pictures of runs and of solutions."""

import json
import math
import sys

import pytest
import torch

import grading
import loss
import train
from errors import InputError
from experiments import draw_run
from experiments.draw_run import RolloutView, TokenView, repaired, run_config, view_rollouts
from problems import Problem
from runtime.checkpoint import load_adapter
from runtime.loading import load_model, load_tokenizer
from teacher import student_prompt, teacher_prompt


def test_a_run_is_drawn_with_what_it_wrote(tmp_path, monkeypatch):
    """Each column in its panel over the steps; what a step could not measure is a gap; held-out scores too."""
    pytest.importorskip("matplotlib")
    (tmp_path / "config.json").write_text('{"config": {"method": "opsd"}, "versions": {}}')
    with pytest.raises(InputError, match="no step in its metrics"):
        draw_run.draw(tmp_path)
    names = [name for columns in draw_run.PANELS.values() for name in columns]
    rows = [{"step": step} | {name: i + step / 10 for i, name in enumerate(names)} for step in range(3)]
    rows[1]["accuracy"] = None
    del rows[2]["forward_kl"]  # which older runs lack
    tenths = [{"by_decile": {"divergence": [float(step)] * 9 + [None]}} for step in range(3)]
    lines = (json.dumps(a | b) + "\n" for a, b in zip(rows, tenths, strict=True))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "evaluation.json").write_text(json.dumps({step: {"sampled": 0.25, "greedy": 0.5} for step in (0, 3)}))
    axes = {axis.get_ylabel(): axis for axis in draw_run.draw(tmp_path).axes}
    for title, columns in draw_run.PANELS.items():
        for name, line in zip(columns, axes[title].lines, strict=True):
            wanted = [math.nan if row.get(name) is None else row[name] for row in rows]
            assert line.get_ydata().tolist() == pytest.approx(wanted, nan_ok=True)
            assert list(line.get_xdata()) == [0, 1, 2]
    greedy = axes[draw_run.HELD_OUT].lines[1]
    assert (list(greedy.get_xdata()), list(greedy.get_ydata())) == ([0, 3], [0.5, 0.5])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        draw_run.draw(tmp_path)


@pytest.mark.parametrize("config", [None, '{"config": {"gone": 1}, "versions": {}}'])
def test_a_folder_that_is_no_run_is_named(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="no run folder"):
        run_config(tmp_path)


def a_view(*texts: str, correct: bool = True):
    tokens = [TokenView(text, 0.1 * i, 0.5, [("b", 0.2, 0.9), ("a", 0.7, 0.1)]) for i, text in enumerate(texts)]
    return RolloutView("x>y", Problem("1<2 & 3", "s", "6"), correct, tokens)


@pytest.mark.slow
def test_tokens_of_a_real_run(tmp_path, monkeypatch, call):
    """The tokens shown are the rollout's, and the alternatives are the likeliest in either context."""
    pytest.importorskip("matplotlib")
    run, views = tmp_path / "run", []
    flags = ["--num_steps", "1", "--batch_size", "2", "--eval_data", "", "--device", "cpu", "--output_dir", str(run)]
    call(train, "--method", "pwopsd", *flags)
    monkeypatch.setattr(draw_run, "draw_tokens", lambda *of: views.extend(of) or draw_run.figure(1, 1, [["a"]])[0])
    call(draw_run, run, "--tokens")
    assert all((run / name).stat().st_size > 0 for name in ("run.png", "tokens.png"))
    before, after = views
    assert "before training" in before.title and "checkpoint-1" in after.title
    for view in views:
        weights = [token.weight for token in view.tokens]
        assert weights == sorted(weights) and weights[-1] > 0.99  # Moderate rises
        for token in view.tokens:
            _, *chances = zip(*token.alternatives, strict=True)
            best = [max(pair) for pair in zip(*chances, strict=True)]
            assert len(best) == 3 and best == sorted(best, reverse=True) and max(map(sum, chances)) <= 1.0 + 1e-6
    assert any(abs(token.divergence) > 1e-4 for token in before.tokens)
    assert before.tokens[-1].text == "<|im_end|>"


@pytest.mark.slow
def test_a_solution_is_scored_as_in_its_run(tmp_path, monkeypatch, call):
    """By its teacher, a live one, in float32 from its 16-bit states; by its step, its grader and its outcome."""

    class AllRight(grading.ExactGrader):
        def match(self, answer, gold):
            return True

    weigh = lambda r_M, scores, lengths, step, options: scores.correct + step  # noqa: E731
    monkeypatch.setitem(loss.METHODS, "mine", loss.Method(loss.clipped_divergence, weigh, loss.token_mean))
    monkeypatch.setitem(grading.GRADERS, "all right", AllRight)
    run = tmp_path / "run"
    call(train, "--method", "mine", "--teacher", "live", "--grader", "all right", "--dtype", "bfloat16", "--num_steps",
         1, "--batch_size", 4, "--learning_rate", 2e-2, "--tau_clip", "inf", "--distill_temperature", 1.1,
         "--eval_data", "", "--device", "cpu", "--output_dir", run)  # fmt: skip
    before, after = view_rollouts(run)
    assert [{token.weight for token in view.tokens} for view in (before, after)] == [{1.0}, {2.0}]
    assert before.correct and after.correct
    model, tokenizer = load_model("tiny", "bfloat16", device="cpu"), load_tokenizer("tiny")
    load_adapter(model, run / "checkpoint-1")
    ids = tokenizer.encode("".join(token.text for token in after.tokens), add_special_tokens=False)
    assert len(ids) == len(after.tokens)
    _, prompts = train.choose_prompts(run_config(run), [after.problem])
    logps = []
    for make in (student_prompt, teacher_prompt):
        x = make(tokenizer, after.problem, prompts)
        with torch.no_grad():
            states = model.model(torch.tensor([x + ids])).last_hidden_state[0, len(x) - 1 : -1]
        logps.append((states.double() @ model.lm_head.weight.double().T / 1.1).log_softmax(dim=-1))
    expected = (logps[1].exp() * (logps[1] - logps[0])).sum(dim=-1)
    assert [token.divergence for token in after.tokens] == pytest.approx(expected.tolist(), abs=1e-5)


def test_only_a_teacher_that_the_checkpoint_holds_scores(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"teacher": "ema"}, "versions": {}}')
    with pytest.raises(InputError, match="not by --teacher ema"):
        view_rollouts(tmp_path)


def test_a_method_of_somebodys_own_is_named_before_the_model_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"method": "mine", "model": "nowhere"}, "versions": {}}')
    with pytest.raises(InputError, match=r"does not know the method of a script of yours .*--method mine"):
        view_rollouts(tmp_path)


def test_repaired_problems_are_right_after_and_not_before(tmp_path):
    texts = {0: ("12", "34", True), 1: ("12", "13", True), 2: ("12", "12", False), 3: ("12", "125", True)}
    rows = []
    for index, (before, after, ends_right) in texts.items():
        for step, text, correct in ((0, before, False), (5, "?", True), (20, after, ends_right)):
            rows.append({"step": step, "problem": index, "text": text, "correct": correct, "decoding": "greedy"})
        rows.append({"step": 20, "problem": index, "text": "", "correct": True, "decoding": "sampled"})
    for step in (0, 20):
        rows.append({"step": step, "problem": 4, "text": "1", "correct": True, "decoding": "greedy"})
    assert repaired(tmp_path) == []
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert repaired(tmp_path) == [1, 3, 0]  # one character differs, one, two


def test_the_picture_shows_the_token_where_the_solutions_part():
    pytest.importorskip("matplotlib")
    drawn = draw_run.draw_tokens(a_view("=", "a", correct=False), a_view("=", "b"))
    strip, before, after = drawn.axes
    texts = [text.get_text() for text in strip.texts]
    assert texts == ["x>y: 1<2 & 3, wrong", "=", "a", "x>y: 1<2 & 3, right", "=", "b"]
    titles = [axis.get_title() for axis in (before, after)]
    assert titles == ["token 2, before training: a", "token 2, after training: b"]
    assert [label.get_text() for label in before.get_yticklabels()] == ["b", "a"]
    assert [bar.get_width() for bar in before.patches] == [0.2, 0.7, 0.9, 0.1]  # student's two, then teacher's
    drawn = draw_run.draw_tokens(a_view("=", "a", correct=False), a_view("=", "a", "b"))  # one is the other's start
    assert [axis.get_title().partition(",")[0] for axis in drawn.axes[1:]] == ["token 2", "token 2"]
