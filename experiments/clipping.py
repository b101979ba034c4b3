"""When the per-entry clip of Eq. (1) turns the gradient around: an account from real rollouts.

    python -m experiments.clipping              train OPSD at clip 0.05, 0.2, 1.0 and none, and measure it on the way

Min(., tau_clip) keeps a clipped entry's value but drops its gradient. With A the entries that are not clipped and P_A
the teacher's mass on them, the gradient with respect to the student's logit i, times T_distill, is

    clipped:    P_A p_S(i) - p_T(i) 1[i in A]              not clipped:    p_S(i) - p_T(i)

A clipped entry always has p_T > p_S: it should rise and is pushed down instead. Where P_A p_S < p_T < p_S, an entry
that should fall is pushed up. Axes: M tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.study import Cell, model_id, run_cell
from loss import divergence_entries, log_probabilities
from model import adapter_disabled, load_model, load_tokenizer, response_hidden, response_mask
from problems import Problem, load_problems
from rollout import Sampling, sample
from runtime.adapters import load_adapter
from runtime.flags import run_script
from runtime.run_folder import write_atomically
from teacher import student_prompt, teacher_prompt
from weighting import relative_position

CLIPS = (0.05, 0.2, 1.0, float("inf"))
STEPS, EVERY, ROLLOUTS, SEED = 30, 5, 64, 0
TEMPERATURE = 1.1  # of the rollouts and of both contexts, as in training
MEASURE_STREAM = 101  # second entry of the rollouts' stream key, apart from those of train.py
COLUMNS = ("clipped_mass", "reversed_entries", "reversed_gradient")
TITLES = ("teacher's mass clipped", "entries with the sign reversed", "gradient with the sign reversed")


def logit_gradients(student_logp_MV: Tensor, teacher_logp_MV: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """d l_t / d z_i * T_distill of Eq. (1), [M, V]: P_A p_S(i) - p_T(i) 1[i in A]; unclipped: p_S(i) - p_T(i)."""
    student_MV, teacher_MV = student_logp_MV.exp(), teacher_logp_MV.exp()
    kept_MV = divergence_entries(student_logp_MV, teacher_logp_MV, beta=0.0) <= clip
    clipped_mass_M = (teacher_MV * ~kept_MV).sum(dim=-1)
    return (1.0 - clipped_mass_M)[:, None] * student_MV - teacher_MV * kept_MV, student_MV - teacher_MV


def clip_statistics(student_logp_MV: Tensor, teacher_logp_MV: Tensor, clip: float) -> Tensor:
    """[M, 3], the COLUMNS: teacher mass clipped, share of the V entries reversed, and their share of sum_i |g_i|."""
    clipped_MV, unclipped_MV = logit_gradients(student_logp_MV, teacher_logp_MV, clip)
    reversed_MV = clipped_MV * unclipped_MV < 0.0
    cut_MV = divergence_entries(student_logp_MV, teacher_logp_MV, beta=0.0) > clip
    size_MV = unclipped_MV.abs()
    return torch.stack(
        [
            (teacher_logp_MV.exp() * cut_MV).sum(dim=-1),
            reversed_MV.float().mean(dim=-1),
            (size_MV * reversed_MV).sum(dim=-1) / size_MV.sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny),
        ],
        dim=1,
    )


@torch.no_grad()
def measure(model, tokenizer, problems: list[Problem], clip: float) -> dict:
    """Sample the problems once from the model as it stands; statistics over all tokens and by tenth of the solution."""
    keys = [(SEED, MEASURE_STREAM, index) for index in range(len(problems))]
    prompts = [student_prompt(tokenizer, problem) for problem in problems]
    responses = sample(model, tokenizer, prompts, keys, Sampling(TEMPERATURE, top_p=0.95, top_k=0, max_new_tokens=96))
    model.eval()
    y = [response.ids for response in responses]
    L = [len(ids) for ids in y]
    head_VD = model.get_output_embeddings().weight

    def in_context(contexts: list[list[int]]) -> Tensor:
        hidden_MD = response_hidden(model, contexts, y)[response_mask(L)]
        return log_probabilities(hidden_MD @ head_VD.T, TEMPERATURE)

    student = in_context(prompts)
    with adapter_disabled(model):
        teacher = in_context([teacher_prompt(tokenizer, problem) for problem in problems])
    values = clip_statistics(student, teacher, clip)
    decile_M = (relative_position(L) * 10).long().clamp(max=9)
    sums = torch.zeros(10, len(COLUMNS)).index_add_(0, decile_M, values)
    means = sums / torch.bincount(decile_M, minlength=10).clamp(min=1)[:, None]
    return {
        **dict(zip(COLUMNS, values.mean(dim=0).tolist(), strict=True)),
        "by_decile": dict(zip(COLUMNS, means.T.tolist(), strict=True)),
        "eos_rate": sum(response.finished for response in responses) / len(problems),
    }


def account(clip: float, output: Path, problems: list[Problem]) -> list[dict]:
    """Train OPSD at one clip with a checkpoint every few steps, and measure each of them; step 0 is the base model."""
    options = {"method": "opsd", "tau_clip": str(clip), "num_steps": STEPS, "save_steps": EVERY}
    cell = Cell(f"clip {clip}", options, SEED, model_id("tiny"))
    trained = run_cell(cell, output, keep_checkpoints=True)
    rows = []
    for step in range(0, STEPS + 1, EVERY):
        model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
        if step:
            load_adapter(model, output / "runs" / cell.folder / f"checkpoint-{step}")
        rows.append({"clip": str(clip), "step": step, **measure(model, tokenizer, problems, clip)})
    rows[-1]["held_out"] = trained["evaluation"][str(STEPS)]["sampled"]
    return rows


def markdown(rows: list[dict]) -> str:
    """Two tables: through training over all positions, and by position (averaged over training)."""
    clips = list(dict.fromkeys(row["clip"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    at = {(row["clip"], row["step"]): row for row in rows}
    lines = [
        "# What the clip does to the gradient",
        "",
        f"OPSD, embedded model, seed {SEED}; {ROLLOUTS} rollouts of training problems at each checkpoint; percent, "
        "means over tokens. A reversed entry is pushed the other way than without the clip; the gradient with the sign "
        "reversed is its share of a token's sum of |p_S - p_T|. By tenth of the solution: means over the checkpoints.",
    ]
    for column, title in zip(COLUMNS, TITLES, strict=True):
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| clip | " + " | ".join(f"step {step}" for step in steps) + " | held-out after |"]
        lines += ["|---" * (len(steps) + 2) + "|"]
        for clip in clips:
            held_out = at[clip, steps[-1]]["held_out"]
            cells = [f"{100 * at[clip, step][column]:.2f}" for step in steps]
            cells.append("-" if held_out is None else f"{100 * held_out:.1f}")
            lines.append(f"| {clip} | " + " | ".join(cells) + " |")
        lines += [
            "",
            "| clip, by tenth of the solution | " + " | ".join(map(str, range(1, 11))) + " |",
            "|---" * 11 + "|",
        ]
        for clip in clips:
            tenths = [sum(at[clip, step]["by_decile"][column][i] for step in steps) / len(steps) for i in range(10)]
            lines.append(f"| {clip} | " + " | ".join(f"{100 * value:.2f}" for value in tenths) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/clipping"), help="clipping.jsonl, clipping.md")
    args = parser.parse_args()
    problems = load_problems("tiny:train")[:ROLLOUTS]
    rows = [row for clip in tqdm(CLIPS, "clips") for row in account(clip, args.output_dir, problems)]
    write_atomically(args.output_dir / "clipping.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomically(args.output_dir / "clipping.md", markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    run_script(main)
