"""What the clips cut, measured where training starts: rollouts of the untrained student, both contexts.

    python -m experiments.clipping                                       the embedded model
    python -m experiments.clipping --model runs/worlds/leap-0.4/model --data runs/worlds/leap-0.4/heldout.jsonl

Min(., tau_clip) keeps a clipped entry's value but drops its gradient. With A the entries that are not clipped and P_A
the teacher's mass on them, the gradient with respect to the student's logit i, times T_distill, is

    clipped:    P_A p_S(i) - p_T(i) 1[i in A]              not clipped:    p_S(i) - p_T(i)

A clipped entry always has p_T > p_S: it should rise and is pushed down instead. Where P_A p_S < p_T < p_S, an entry
that should fall is pushed up. The clip of a whole token drops the tokens above it, with all of their entries; which
tokens these are is told by one chosen alternative, the leap of study/worlds.py. Axes: M tokens, V vocabulary.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from errors import InputError
from loss import divergence_entries, log_probabilities
from model import load_model, load_tokenizer, response_hidden, response_mask
from problems import Problem, load_problems
from rollout import Sampling, sample
from runtime.flags import run_script
from teacher import student_prompt, teacher_prompt

CLIPS = (1.0, 0.2, 0.05)
ROLLOUTS, SEED = 64, 0
SAMPLING = Sampling(temperature=1.1, top_p=0.95, top_k=0, max_new_tokens=128)  # T also of both contexts, as in training
MEASURE_STREAM = 101  # second entry of the rollouts' stream key, apart from those of train.py
PROPOSED = 0.2  # the teacher's probability above which it proposes the chosen token
COLUMNS = {
    "tokens": "tokens with a cut entry",
    "mass": "teacher's mass cut",
    "divergence": "divergence on cut entries",
    "on_token": "- of that on `{}`",
    "dropped": "tokens that the token clip drops",
    "at_token": "- of these where the teacher proposes `{}`",
}


def logit_gradients(student_logp_MV: Tensor, teacher_logp_MV: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """d l_t / d z_i * T_distill of Eq. (1), [M, V]: P_A p_S(i) - p_T(i) 1[i in A]; unclipped: p_S(i) - p_T(i)."""
    student_MV, teacher_MV = student_logp_MV.exp(), teacher_logp_MV.exp()
    kept_MV = divergence_entries(student_logp_MV, teacher_logp_MV, beta=0.0) <= clip
    clipped_mass_M = (teacher_MV * ~kept_MV).sum(dim=-1)
    return (1.0 - clipped_mass_M)[:, None] * student_MV - teacher_MV * kept_MV, student_MV - teacher_MV


def account(student_logp_MV: Tensor, teacher_logp_MV: Tensor, clip: float, token: int) -> dict[str, float]:
    """The COLUMNS as shares; nan for a share of nothing.

    Divergence: the sum of the cut entries of Eq. (1), which get no gradient, out of the sum of all positive entries.
    """
    entries_MV = divergence_entries(student_logp_MV, teacher_logp_MV, beta=0.0)
    cut_MV, dropped_M = entries_MV > clip, entries_MV.sum(dim=-1) > clip
    proposed_M = teacher_logp_MV[:, token].exp() > PROPOSED
    cut = (entries_MV * cut_MV).sum(dim=0)
    return {
        "tokens": cut_MV.any(dim=-1).float().mean().item(),
        "mass": (teacher_logp_MV.exp() * cut_MV).sum(dim=-1).mean().item(),
        "divergence": (cut.sum() / entries_MV.clamp(min=0.0).sum()).item(),
        "on_token": (cut[token] / cut.sum()).item(),
        "dropped": dropped_M.float().mean().item(),
        "at_token": proposed_M[dropped_M].float().mean().item(),
    }


@torch.no_grad()
def both_contexts(model, tokenizer, problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """log p_t and log p^opsd_t of one rollout of each problem, both [M, V], from the model as it is."""
    prompts = [student_prompt(tokenizer, problem) for problem in problems]
    keys = [(SEED, MEASURE_STREAM, index) for index in range(len(problems))]
    y = [response.ids for response in sample(model, tokenizer, prompts, keys, SAMPLING)]
    model.eval()
    head_VD, mask = model.get_output_embeddings().weight, response_mask([len(ids) for ids in y])

    def scored(contexts: list[list[int]]) -> Tensor:
        return log_probabilities(response_hidden(model, contexts, y)[mask] @ head_VD.T, SAMPLING.temperature)

    return scored(prompts), scored([teacher_prompt(tokenizer, problem) for problem in problems])


def markdown(student_logp_MV: Tensor, teacher_logp_MV: Tensor, token: int, text: str) -> str:
    """A column a clip, in percent, and how many tokens were measured."""
    accounts = [account(student_logp_MV, teacher_logp_MV, clip, token) for clip in CLIPS]
    lines = ["| % | " + " | ".join(f"tau_clip {clip:g}" for clip in CLIPS) + " |", "|---" * (len(CLIPS) + 1) + "|"]
    for name, title in COLUMNS.items():
        lines.append(f"| {title.format(text)} | " + " | ".join(f"{100 * each[name]:.1f}" for each in accounts) + " |")
    proposed = (teacher_logp_MV[:, token].exp() > PROPOSED).float().mean().item()
    divergence = divergence_entries(student_logp_MV, teacher_logp_MV, beta=0.0).sum(dim=-1).mean().item()
    return "\n".join([
        *lines, "",
        f"{len(student_logp_MV)} tokens, divergence {divergence:.4f} nats a token without a clip; the teacher gives "
        f"`{text}` more than {PROPOSED:g} at {100 * proposed:.1f} % of them.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tiny", help="directory or hub name of a small model (whole logits are kept)"
    )
    parser.add_argument(
        "--data", default="tiny:heldout", help=f"problems with solutions; the first {ROLLOUTS} are used"
    )
    parser.add_argument("--token", default="~", help="the chosen alternative, one token; the default is the leap")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, device="cpu"), load_tokenizer(args.model)
    ids = tokenizer.encode(args.token, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(f"--token {args.token!r}: {len(ids)} tokens of {args.model}, not one")
    student_logp_MV, teacher_logp_MV = both_contexts(model, tokenizer, load_problems(args.data)[:ROLLOUTS])
    print(markdown(student_logp_MV, teacher_logp_MV, ids[0], args.token))


if __name__ == "__main__":
    run_script(main)
