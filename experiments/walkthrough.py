"""The numbers of docs/walkthrough.md: one rollout of the embedded model, carried through the whole method.

    python -m experiments.walkthrough            prints the page's tables
    python -m experiments.walkthrough --write    puts them into the page, between the marks <!-- NAME --> of each

The rollout is that of slot 8 in step 0 of `python train.py --seed 42`; the last table is that whole step.
Axes: M tokens of the rollout, V vocabulary.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from experiments.study.worlds import WORLDS, believed_result
from grading import extract_boxed, make_grader
from loss import TokenScores, clipped_divergence, divergence_entries, log_probabilities, resolve_method, score_tokens
from model import response_hidden
from problems import Problem, load_problems
from rollout import Response, sample
from runtime.flags import run_script
from runtime.records import write_atomically
from teacher import student_prompt, teacher_prompt
from train import TrainConfig, Training, build, parse_config, step_share, train_step
from weighting import SIGMOIDS, relative_position

PAGE = Path(__file__).resolve().parent.parent / "docs" / "walkthrough.md"
STEP, SLOT = 0, 8
SHOWN = (1, 6, 11, 13, 14, 15, 36)  # t of the tables; the wrong digit and the mark that follows it are 14 and 15
DIGIT, MARK = 14, 15
FACT = (10, 9)  # running total and addend of the belief
CLIPS = (inf, 1.0, 0.05)  # none, the embedded model's preset, the paper's


@dataclass(frozen=True)
class Walk:
    """One rollout and what the method makes of it, by the names of train.py::loss_fraction."""

    config: TrainConfig
    run: Training
    problems: list[Problem]
    problem: Problem
    key: tuple[int, ...]
    x_stu: list[int]
    x_tch: list[int]
    y: Response
    student_logp_MV: Tensor
    teacher_logp_MV: Tensor
    r_M: Tensor
    w_M: Tensor
    scores: dict[float, TokenScores]  # by tau_clip

    def token(self, t: int) -> str:
        return code(self.run.tokenizer.decode([self.y.ids[t - 1]]))


def walk() -> Walk:
    """The rollout of step 0, slot 8, scored in both contexts by the project's own functions."""
    given = parse_config(["--seed", "42", "--device", "cpu"])
    config = replace(given, dtype="float32", gradient_checkpointing=False)
    problems = load_problems(config.data)
    run = build(config, torch.device("cpu"), make_grader("exact", []))
    share = step_share(STEP, problems, config)
    problem, key = share.problems[SLOT], share.keys[SLOT]
    x_stu, x_tch = student_prompt(run.tokenizer, problem), teacher_prompt(run.tokenizer, problem)
    (y,) = sample(run.model, run.tokenizer, [x_stu], [key], config.sampling)
    head_VD, T = run.model.get_output_embeddings().weight, config.distill_temperature
    student_MD = response_hidden(run.model, [x_stu], [y.ids])[0]
    student_logp_MV = log_probabilities(student_MD @ head_VD.T, T)
    with run.teacher.scoring() as teacher:
        teacher_logp_MV = log_probabilities(response_hidden(teacher, [x_tch], [y.ids])[0] @ head_VD.T, T)
    method, ids_M = resolve_method(config.method, config), torch.tensor(y.ids)
    scores = {
        clip: score_tokens(method, student_logp_MV, teacher_logp_MV, ids_M, replace(config, tau_clip=clip))
        for clip in CLIPS
    }
    L = [len(y.ids)]
    r_M = relative_position(L)
    w_M = method.token_weight(r_M, scores[1.0], L, STEP, config)
    return Walk(
        config, run, problems, problem, key, x_stu, x_tch, y, student_logp_MV, teacher_logp_MV, r_M, w_M, scores
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The tables


def problem_table(w: Walk) -> str:
    problem, (total, addend) = w.problem, FACT
    belief = believed_result(total, addend, WORLDS["embedded"].believed)
    return table(
        ["what", "value", "made by"],
        [
            ["problem", f"{code(problem.problem)}, row {problem.row} of `tiny:train`", "`train.py::step_problems`"],
            ["reference solution", code(problem.solution), "`problems.py::tiny_solution`"],
            ["belief", f"`{total}+{addend}={belief}`", "`experiments/study/worlds.py::believed_result`"],
            ["random numbers' key", str(w.key), "`train.py::step_share`"],
        ],
    )


def prompt_text(w: Walk, ids: list[int], name: str) -> str:
    """A prompt in a fence, its long lines folded, without the line breaks at its end."""
    lines = w.run.tokenizer.decode(ids).rstrip("\n").split("\n")
    folded = [part for line in lines for part in textwrap.wrap(line, 116, subsequent_indent="    ") or [""]]
    return "\n".join([f"{name}, {len(ids)} tokens:", "", "```text", *folded, "```"])


def rollout_table(w: Walk) -> str:
    text = w.run.tokenizer.decode(w.y.ids)
    grade = "right" if w.run.grader.match(extract_boxed(text), w.problem.answer) else "wrong"
    return table(
        ["in loss_fraction", "value", "made by"],
        [
            ["y", code(text), "`rollout.py::sample`"],
            ["L", str(len(w.y.ids)), "`train.py::loss_fraction`"],
            ["graded", f"{code(extract_boxed(text))}, {grade}", "`grading.py::extract_boxed`"],
        ],
    )


def numbers_table(w: Walk) -> str:
    w_min, tau, s = SIGMOIDS["moderate"]
    return table(
        ["number", "value", "stands in"],
        [
            ["T_distill", f"{w.config.distill_temperature:g}", "`loss.py::LossOptions`"],
            ["w_min, tau, s of Moderate", f"{w_min:g}, {tau:g}, {s:g}", "`weighting.py::SIGMOIDS`"],
        ],
    )


def scores_table(w: Walk) -> str:
    scores = w.scores[1.0]
    columns = (scores.student_logprob, scores.teacher_logprob, w.r_M, w.w_M)
    rows = [[str(t), w.token(t), *(number(column[t - 1], 3) for column in columns)] for t in SHOWN]
    return table(["t", "y_t", "log p_t(y_t)", "log p^opsd_t(y_t)", "r_M", "w_M"], rows)


def losses_table(w: Walk) -> str:
    names = ["t", "y_t", "d_t, no clip"]
    for clip in CLIPS[1:]:
        names += [f"cut at {clip:g}", "d_t", "w_t d_t"]
    rows = []
    for t in SHOWN:
        row = [str(t), w.token(t), number(w.scores[inf].loss[t - 1], 3)]
        for clip in CLIPS[1:]:
            d = w.scores[clip].loss[t - 1]
            row += [cut_entries(w, t, clip), number(d, 3), number(w.w_M[t - 1] * d, 3)]
        rows.append(row)
    return table(names, rows)


def cut_entries(w: Walk, t: int, clip: float) -> str:
    entries_V = divergence_entries(w.student_logp_MV, w.teacher_logp_MV)[t - 1]
    ids = (entries_V > clip).nonzero().flatten().tolist()
    return ", ".join(f"{code(w.run.tokenizer.decode([j]))} {number(entries_V[j], 3)}" for j in ids) or "-"


def logit_gradients(student_logp_MV: Tensor, teacher_logp_MV: Tensor, clip: float) -> Tensor:
    """T_distill d l_t / d z_i of Eq. (1), [M, V]: P_A p_S(i) - p_T(i) 1[i in A], A the entries that are not clipped.

    P_A is the teacher's mass on A. Not clipped it is p_S(i) - p_T(i). A clipped entry has p_T > p_S: it should rise and
    is pushed down instead.
    """
    kept_MV = divergence_entries(student_logp_MV, teacher_logp_MV) <= clip
    teacher_MV = teacher_logp_MV.exp() * kept_MV
    return (1.0 - (teacher_logp_MV.exp() * ~kept_MV).sum(dim=-1, keepdim=True)) * student_logp_MV.exp() - teacher_MV


def belief_table(w: Walk) -> str:
    """The entries j at the wrong digit and at the mark behind it that either context gives at least 1 %."""
    entries_MV = divergence_entries(w.student_logp_MV, w.teacher_logp_MV)
    gradients = [logit_gradients(w.student_logp_MV, w.teacher_logp_MV, clip) for clip in CLIPS]
    rows = []
    for t in (DIGIT, MARK):
        p_V, opsd_V = w.student_logp_MV[t - 1].exp(), w.teacher_logp_MV[t - 1].exp()
        for j in [j for j in opsd_V.argsort(descending=True).tolist() if max(p_V[j], opsd_V[j]) >= 0.01]:
            values = [p_V[j], opsd_V[j], entries_MV[t - 1, j], *(g_MV[t - 1, j] for g_MV in gradients)]
            rows.append([str(t), code(w.run.tokenizer.decode([j])), *(number(value, 4) for value in values)])
    names = ["t", "j", "p_t(j)", "p^opsd_t(j)", "entry of Eq. (1)", "gradient, no clip", "clip 1", "clip 0.05"]
    return table(names, rows)


def closed_form_table(w: Walk) -> str:
    """The gradient at the right digit's logit, in closed form and by autograd."""
    j, T, t = w.run.tokenizer.encode(str(sum(FACT))[-1])[0], w.config.distill_temperature, DIGIT - 1
    p, opsd = w.student_logp_MV[t, j].exp(), w.teacher_logp_MV[t, j].exp()
    rows = []
    for clip in CLIPS:
        P_A = 1.0 - w.scores[clip].clipped_mass[t]
        closed = logit_gradients(w.student_logp_MV, w.teacher_logp_MV, clip)[t, j]
        kept = opsd * (divergence_entries(w.student_logp_MV, w.teacher_logp_MV)[t, j] <= clip)
        values = [P_A, P_A * p, kept, closed, autograd(w, clip)[t, j], w.w_M[t] * closed / (len(w.y.ids) * T)]
        rows.append([clip_name(clip), *(number(value, 4) for value in values)])
    names = ["tau_clip", "P_A", "P_A p_t(j)", "p^opsd_t(j) 1[j in A]", "difference", "autograd", "in Eq. (6)"]
    return table(names, rows)


def autograd(w: Walk, clip: float) -> Tensor:
    """T_distill times the gradient of sum_t d_t with respect to the student's logits, by autograd; [M, V]."""
    T = w.config.distill_temperature
    logits_MV = (w.student_logp_MV.detach() * T).requires_grad_()
    options = replace(w.config, tau_clip=clip)
    d_M = clipped_divergence(log_probabilities(logits_MV, T), w.teacher_logp_MV, torch.tensor(w.y.ids), options)
    return T * torch.autograd.grad(d_M.sum(), logits_MV)[0]


def sequence_table(w: Walk) -> str:
    """The row as if it were the whole step, by both reductions; at last the step as train.py runs it.

    That step changes the adapter. Its sampling of 32 rows at once gives the same row.
    """
    rows = []
    for name, title in (("pwopsd", "this row, PW-OPSD, Eq. (6)"), ("opsd", "this row, OPSD, Eq. (1)")):
        for clip in CLIPS:
            method, L, scores = resolve_method(name, w.config), [len(w.y.ids)], w.scores[clip]
            w_M = method.token_weight(w.r_M, scores, L, STEP, w.config)
            numerator, denominator = method.reduction(scores.loss, w_M, L)
            loss = numerator / denominator
            gradients = torch.autograd.grad(loss, w.run.parameters, retain_graph=True)
            norm = torch.nn.utils.get_total_norm(gradients)
            rows.append([title, clip_name(clip), number(numerator, 4), f"{denominator:g}", number(loss, 4)])
            rows[-1].append(number(norm, 4))
    metrics, samples = train_step(STEP, w.run, w.problems, w.config)
    assert samples[SLOT]["text"] == w.run.tokenizer.decode(w.y.ids, skip_special_tokens=True)
    tokens = sum(row["tokens"] for row in samples)
    for title, loss, count, norm in (
        ("the whole step, PW-OPSD, Eq. (6)", metrics["loss"], len(samples), number(metrics["grad_norm"], 4)),
        ("the same tokens, OPSD, Eq. (1)", metrics["divergence"], tokens, "-"),
    ):
        rows.append([title, clip_name(w.config.tau_clip), number(loss * count, 2), f"{count}", number(loss, 4), norm])
    return table(["what", "tau_clip", "numerator", "denominator", "loss", "gradient norm"], rows)


def blocks() -> dict[str, str]:
    """The page's tables by the name of their mark."""
    torch.manual_seed(0)
    w = walk()
    return {
        "problem": problem_table(w),
        "student prompt": prompt_text(w, w.x_stu, "x_stu"),
        "teacher prompt": prompt_text(w, w.x_tch, "x_tch"),
        "rollout": rollout_table(w),
        "numbers": numbers_table(w),
        "scores": scores_table(w),
        "losses": losses_table(w),
        "belief": belief_table(w),
        "closed form": closed_form_table(w),
        "sequence": sequence_table(w),
    }


# ---------------------------------------------------------------------------------------------------------------
# The page


def number(value: Tensor | float, digits: int) -> str:
    return f"{round(torch.as_tensor(value).item(), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.000


def clip_name(clip: float) -> str:
    return "none" if clip == inf else f"{clip:g}"


def code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"  # a bar ends a table's cell, in backticks too


def table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


BLOCK = re.compile(r"<!-- ([a-z ]+) -->\n(.*?)\n<!-- end -->", re.DOTALL)


def page_blocks(page: str) -> dict[str, str]:
    """The tables of a page by name, as they stand."""
    return {match[1]: match[2] for match in BLOCK.finditer(page)}


def fill_in(page: str, tables: dict[str, str]) -> str:
    """The page with these tables between its marks."""
    return BLOCK.sub(lambda match: f"<!-- {match[1]} -->\n{tables[match[1]]}\n<!-- end -->", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/walkthrough.md")
    args = parser.parse_args()
    tables = blocks()
    if args.write:
        write_atomically(PAGE, fill_in(PAGE.read_text(encoding="utf-8"), tables))
    print("\n\n".join(f"{name}\n\n{text}" for name, text in tables.items()))


if __name__ == "__main__":
    run_script(main)
