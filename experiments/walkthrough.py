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
from dataclasses import replace
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from experiments.study.report import markdown
from experiments.study.worlds import WORLDS, believed_result
from grading import extract_boxed, make_grader
from loss import clipped_divergence, divergence_entries, log_probabilities, resolve_method, score_tokens
from model import response_hidden
from problems import load_problems
from rollout import sample
from runtime.flags import run_script
from runtime.records import write_atomically
from teacher import student_prompt, teacher_prompt
from train import build, parse_config, step_share, train_step
from weighting import SIGMOIDS, relative_position

PAGE = Path(__file__).resolve().parent.parent / "docs" / "walkthrough.md"
STEP, SLOT = 0, 8
SHOWN = (1, 6, 11, 13, 14, 15, 36)  # t of the tables; the wrong digit and the mark that follows it are 14 and 15
DIGIT, MARK = 14, 15
FACT = (10, 9)  # running total and addend of the belief
CLIPS = (inf, 1.0, 0.05)  # none, the embedded model's preset, the paper's


class Walk:
    """One rollout, scored in both contexts by the project's own functions; its names are train.py::loss_fraction's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        given = parse_config(["--seed", "42", "--device", "cpu"])
        self.config = config = replace(given, dtype="float32", gradient_checkpointing=False)
        self.problems, self.T = load_problems(config.data), config.distill_temperature
        self.run = run = build(config, torch.device("cpu"), make_grader("exact", []))
        drawn, keys = step_share(STEP, self.problems, config)
        self.problem, self.key = drawn[SLOT], keys[SLOT]
        self.x_stu, self.x_tch = (prompt(run.tokenizer, self.problem) for prompt in (student_prompt, teacher_prompt))
        (y,) = sample(run.model, run.tokenizer, [self.x_stu], [self.key], config.sampling)
        self.y, self.L, self.text = y.ids, [len(y.ids)], run.tokenizer.decode(y.ids)
        head_VD = run.model.get_output_embeddings().weight
        student_MD = response_hidden(run.model, [self.x_stu], [self.y])[0]
        self.student_logp_MV = log_probabilities(student_MD @ head_VD.T, self.T)
        with run.teacher.scoring() as teacher:
            teacher_MD = response_hidden(teacher, [self.x_tch], [self.y])[0]
            self.teacher_logp_MV = log_probabilities(teacher_MD @ head_VD.T, self.T)
        self.entries_MV = divergence_entries(self.student_logp_MV, self.teacher_logp_MV)
        method, contexts = resolve_method(config.method, config), (self.student_logp_MV, self.teacher_logp_MV)
        self.scores = {  # by tau_clip
            clip: score_tokens(method, *contexts, torch.tensor(self.y), replace(config, tau_clip=clip))
            for clip in CLIPS
        }
        self.r_M = relative_position(self.L)
        self.w_M = method.token_weight(self.r_M, self.scores[1.0], self.L, STEP, config)

    def token(self, j: int) -> str:
        return code(self.run.tokenizer.decode([j]))

    def y_t(self, t: int) -> str:
        return self.token(self.y[t - 1])


# ---------------------------------------------------------------------------------------------------------------
# The tables


def problem_table(w: Walk) -> str:
    problem, (total, addend) = w.problem, FACT
    belief = believed_result(total, addend, WORLDS["embedded"].believed)
    rows = [
        ("problem", f"{code(problem.problem)}, row {problem.row} of `tiny:train`", "`train.py::step_problems`"),
        ("reference solution", code(problem.solution), "`problems.py::tiny_solution`"),
        ("belief", f"`{total}+{addend}={belief}`", "`experiments/study/worlds.py::believed_result`"),
        ("random numbers' key", w.key, "`train.py::step_share`"),
    ]
    return table("what | value | made by", rows)


def prompt_text(w: Walk, ids: list[int], name: str) -> str:
    """A prompt in a fence, its long lines folded, without the line breaks at its end."""
    lines = w.run.tokenizer.decode(ids).rstrip("\n").split("\n")
    folded = [part for line in lines for part in textwrap.wrap(line, 116, subsequent_indent="    ") or [""]]
    return "\n".join([f"{name}, {len(ids)} tokens:", "", "```text", *folded, "```"])


def rollout_table(w: Walk) -> str:
    grade = "right" if w.run.grader.match(extract_boxed(w.text), w.problem.answer) else "wrong"
    rows = [
        ("y", code(w.text), "`rollout.py::sample`"),
        ("L", w.L[0], "`train.py::loss_fraction`"),
        ("graded", f"{code(extract_boxed(w.text))}, {grade}", "`grading.py::extract_boxed`"),
    ]
    return table("in loss_fraction | value | made by", rows)


def numbers_table(w: Walk) -> str:
    sigmoid = ", ".join(f"{value:g}" for value in SIGMOIDS["moderate"])
    rows = [("T_distill", f"{w.T:g}", "`loss.py::LossOptions`"),
            ("w_min, tau, s of Moderate", sigmoid, "`weighting.py::SIGMOIDS`")]  # fmt: skip
    return table("number | value | stands in", rows)


def scores_table(w: Walk) -> str:
    columns = (w.scores[1.0].student_logprob, w.scores[1.0].teacher_logprob, w.r_M, w.w_M)
    rows = [[t, w.y_t(t), *(number(column[t - 1], 3) for column in columns)] for t in SHOWN]
    return table("t | y_t | log p_t(y_t) | log p^opsd_t(y_t) | r_M | w_M", rows)


def losses_table(w: Walk) -> str:
    rows = []
    for t in SHOWN:
        rows.append([t, w.y_t(t), number(w.scores[inf].loss[t - 1], 3)])
        for clip in CLIPS[1:]:
            d, entries_V = w.scores[clip].loss[t - 1], w.entries_MV[t - 1]
            above = [f"{w.token(j)} {number(entries_V[j], 3)}" for j in (entries_V > clip).nonzero().flatten().tolist()]
            rows[-1] += [", ".join(above) or "-", number(d, 3), number(w.w_M[t - 1] * d, 3)]
    cut = "".join(f" | cut at {clip:g} | d_t | w_t d_t" for clip in CLIPS[1:])
    return table(f"t | y_t | d_t, no clip{cut}", rows)


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
    gradients = [logit_gradients(w.student_logp_MV, w.teacher_logp_MV, clip) for clip in CLIPS]
    rows = []
    for t in (DIGIT, MARK):
        p_V, opsd_V = w.student_logp_MV[t - 1].exp(), w.teacher_logp_MV[t - 1].exp()
        columns = (p_V, opsd_V, w.entries_MV[t - 1], *(g_MV[t - 1] for g_MV in gradients))
        shown = [j for j in opsd_V.argsort(descending=True).tolist() if max(p_V[j], opsd_V[j]) >= 0.01]
        rows += [[t, w.token(j), *(number(column[j], 4) for column in columns)] for j in shown]
    head = "t | j | p_t(j) | p^opsd_t(j) | entry of Eq. (1) | gradient, no clip | clip 1 | clip 0.05"
    return table(head, rows)


def closed_form_table(w: Walk) -> str:
    """The gradient at the right digit's logit, in closed form and by autograd."""
    j, t = w.run.tokenizer.encode(str(sum(FACT))[-1])[0], DIGIT - 1
    p, opsd = w.student_logp_MV[t, j].exp(), w.teacher_logp_MV[t, j].exp()
    rows = []
    for clip in CLIPS:
        P_A = 1.0 - w.scores[clip].clipped_mass[t]
        closed = logit_gradients(w.student_logp_MV, w.teacher_logp_MV, clip)[t, j]
        kept = opsd * (w.entries_MV[t, j] <= clip)
        values = [P_A, P_A * p, kept, closed, autograd(w, clip)[t, j], w.w_M[t] * closed / (w.L[0] * w.T)]
        rows.append([clip_name(clip), *(number(value, 4) for value in values)])
    return table("tau_clip | P_A | P_A p_t(j) | p^opsd_t(j) 1[j in A] | difference | autograd | in Eq. (6)", rows)


def autograd(w: Walk, clip: float) -> Tensor:
    """T_distill times the gradient of sum_t d_t with respect to the student's logits, by autograd; [M, V]."""
    logits_MV = (w.student_logp_MV.detach() * w.T).requires_grad_()
    student_logp_MV, options = log_probabilities(logits_MV, w.T), replace(w.config, tau_clip=clip)
    d_M = clipped_divergence(student_logp_MV, w.teacher_logp_MV, torch.tensor(w.y), options)
    return w.T * torch.autograd.grad(d_M.sum(), logits_MV)[0]


def sequence_table(w: Walk) -> str:
    """The row as if it were the whole step, by both reductions; at last the step as train.py runs it.

    That step changes the adapter. Its sampling of 32 rows at once gives the same row.
    """
    rows = []
    for name, title in (("pwopsd", "this row, PW-OPSD, Eq. (6)"), ("opsd", "this row, OPSD, Eq. (1)")):
        for clip in CLIPS:
            method, scores = resolve_method(name, w.config), w.scores[clip]
            w_M = method.token_weight(w.r_M, scores, w.L, STEP, w.config)
            numerator, denominator = method.reduction(scores.loss, w_M, w.L)
            gradients = torch.autograd.grad(numerator / denominator, w.run.parameters, retain_graph=True)
            norm = number(torch.nn.utils.get_total_norm(gradients), 4)
            quotient = [number(numerator, 4), f"{denominator:g}", number(numerator / denominator, 4)]
            rows.append([title, clip_name(clip), *quotient, norm])
    metrics, samples = train_step(STEP, w.run, w.problems, w.config)
    assert samples[SLOT]["text"] == w.run.tokenizer.decode(w.y, skip_special_tokens=True)
    for title, loss, count, norm in (
        ("the whole step, PW-OPSD, Eq. (6)", metrics["loss"], len(samples), number(metrics["grad_norm"], 4)),
        ("the same tokens, OPSD, Eq. (1)", metrics["divergence"], sum(row["tokens"] for row in samples), "-"),
    ):
        rows.append([title, clip_name(w.config.tau_clip), number(loss * count, 2), count, number(loss, 4), norm])
    return table("what | tau_clip | numerator | denominator | loss | gradient norm", rows)


def blocks(w: Walk) -> dict[str, str]:
    """The page's tables by the name of their mark."""
    tables = {
        "problem": problem_table, "student prompt": lambda w: prompt_text(w, w.x_stu, "x_stu"),
        "teacher prompt": lambda w: prompt_text(w, w.x_tch, "x_tch"), "rollout": rollout_table,
        "numbers": numbers_table, "scores": scores_table, "losses": losses_table, "belief": belief_table,
        "closed form": closed_form_table, "sequence": sequence_table,
    }  # fmt: skip
    return {name: make(w) for name, make in tables.items()}


# ---------------------------------------------------------------------------------------------------------------
# The page


def number(value: Tensor | float, digits: int) -> str:
    return f"{round(torch.as_tensor(value).item(), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.000


def clip_name(clip: float) -> str:
    return "none" if clip == inf else f"{clip:g}"


def code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"  # a bar ends a table's cell, in backticks too


def table(head: str, rows: list) -> str:
    return markdown(head.split(" | "), rows)


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
    tables = blocks(Walk())
    if args.write:
        write_atomically(PAGE, fill_in(PAGE.read_text(encoding="utf-8"), tables))
    print("\n\n".join(f"{name}\n\n{text}" for name, text in tables.items()))


if __name__ == "__main__":
    run_script(main)
