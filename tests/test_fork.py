"""What a fork does to try an idea of its own: name it in one place, and every script knows it.

A new weighting by position is one line of weighting.SCHEDULES, a method one row of loss.METHODS.
"""

import json
from pathlib import Path

import pytest
from families import odd
from transformers import AutoModelForCausalLM, AutoTokenizer

import grading
import loss
import train
import weighting
from errors import InputError

ROOT = Path(__file__).resolve().parent.parent


# What people change, as a script of their own (train.cli() stands behind each) and the flags they give it.
SCRIPTS = {
    "a weight": ('weighting.SCHEDULES["middle"] = lambda r: ((r > 0.25) & (r < 0.75)).float()', "--schedule middle"),
    "a token loss": (
        """
def squared_hellinger(student_logp_MV, teacher_logp_MV, ids_M, options):
    return 1.0 - (0.5 * (student_logp_MV + teacher_logp_MV)).exp().sum(dim=-1)
loss.METHODS["hellinger"] = loss.Method(squared_hellinger, "uniform", loss.token_mean)""",
        "--method hellinger",
    ),
    "other data": ("", ""),  # which all of them have, on columns of their own
    "a new family": ("", "--model {family}"),
    "another teacher": ("", "--teacher {teacher}"),
    "an own grader": (
        """
class Lenient(grading.ExactGrader):
    def match(self, answer, gold):
        return True
grading.GRADERS["lenient"] = Lenient""",
        "--grader lenient",
    ),
}


@pytest.mark.parametrize("task", SCRIPTS)
def test_what_forks_change(task, tmp_path, monkeypatch, call):
    """Each trains a step; README's table tells the lines."""
    script, flags = SCRIPTS[task]
    for module, name in ((weighting, "SCHEDULES"), (loss, "METHODS"), (grading, "GRADERS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    data, run = tmp_path / "data.csv", tmp_path / "run"
    data.write_text("task,why,key\n" + 8 * "1+1+1+1+1,1+1=2;\\boxed{5},5\n")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny-model")
    kinds = {"family": lambda: odd("Phi3", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
             "teacher": lambda: AutoModelForCausalLM.from_pretrained(ROOT / "tiny-model")}  # fmt: skip
    for kind in [kind for kind in kinds if f"{{{kind}}}" in flags]:
        kinds[kind]().save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    fixed = f"--data {data} --columns problem=task,answer=key,solution=why --eval_data= --num_steps 1 --batch_size 4"
    fixed += f" --max_new_tokens 64 --device cpu --output_dir {run} "
    words = (fixed + flags.format(family=tmp_path / "family", teacher=tmp_path / "teacher")).split()
    exec(script, {"loss": loss, "weighting": weighting, "grading": grading})
    call(train, *words)
    row = json.loads((run / "metrics.jsonl").read_text())
    assert row["grad_norm"] >= 0.0
    grader = json.loads((run / "config.json").read_text())["config"]["grader"]
    assert (grader == "lenient") == (task == "an own grader") and (grader != "lenient" or row["accuracy"] == 1.0)
    assert f"| {task} | {len(script.strip().splitlines())} " in (ROOT / "README.md").read_text()


def test_a_prompt_of_a_forks_own_is_measured_too(monkeypatch, call, tmp_path):
    """`train.teacher.teacher_prompt` is what a step asks; what is left out, and rehearsed, must be counted by it."""
    theirs = train.teacher.teacher_prompt
    monkeypatch.setattr(train.teacher, "teacher_prompt", lambda *given, **more: 50 * theirs(*given, **more))
    with pytest.raises(InputError, match="no prompt leaves room for 96 new tokens in 512"):
        call(train, "--num_steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "run"))
