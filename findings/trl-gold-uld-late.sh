#!/usr/bin/env bash
# Guess: GOLDTrainer's loss for two tokenizers (use_uld_loss=True) is near 0 where student and teacher are both sure of
# the same text, and descending it makes the student surer of that text, from its first token on. Where the student
# spells 42 in two tokens and the teacher in one, their probabilities are multiplied, as the documentation says.
# True (trl 1.16.0): at the default uld_token_merge_strategy="observed" the loss of two models that are both sure of
# "42." is .5, and a student with .60 on each right token that descends it to .002 ends at P(4) .60, as before,
# P(2 after 4) 1.00 and P(. after 42) .00, since P(2 after 42) is 1.00: it has learned to stutter. Where the answer is
# one token, only the end after it is taught. With "bayesian" the loss is 0 and the three end at 1.00.
# Why: ULDLoss._compute_distillation_loss cuts the logits out at the answer's own positions, where they speak of the
# token after. So the first token of an answer has no loss, and _merge_probabilities_with_alignment_groups, which looks
# up the "actual later tokens" in them, multiplies by the chance that a token comes twice. The student's distribution
# after 4 is held against the teacher's after 42. "bayesian" starts one position earlier.
# The option's own help says where each strategy cuts; it does not say that one of the two cuts predicts another token.
# Bites: the very use of GOLD. Qwen spells a number digit by digit and Llama-3 in groups of up to three, so that a
# number of two digits or more is such a group; and, at the default uld_crossentropy_weight of 0, the first token of an
# answer, the answer itself where it is short, is not learned at all.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check trl==1.16.0 transformers==5.23.0
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1
cat > seen.py <<'PY'
from importlib.metadata import version

import torch
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

default = GOLDConfig(output_dir="out", use_cpu=True, bf16=False).uld_token_merge_strategy
print("trl", version("trl"), "default:", default)
assert default == "observed"
# ids and byte offsets: a prompt token, the answer's tokens, <eos>
TWO = dict(student=("Q 4 2 . <eos>", [(0, 0), (0, 1), (1, 2), (2, 3), (3, 3)]),
           teacher=("Q 42 . <eos>", [(0, 0), (0, 2), (2, 3), (3, 3)]))
ONE = dict(student=("Q 4 <eos>", [(0, 0), (0, 1), (1, 1)]), teacher=("Q 4 <eos>", [(0, 0), (0, 1), (1, 1)]))
VOCABULARY = "<eos> Q 4 2 . 42".split()


def sure(ids, logit):
    """Logits that give each next token of `ids` this logit, and all others 0."""
    logits = torch.zeros(1, len(ids), len(VOCABULARY))
    logits[0, torch.arange(len(ids) - 1), ids[1:]] = logit
    return logits


def descend(text, strategy, logit, steps):
    """(loss before, loss after, the student's P(right next token) before and after, P(same token again) after)."""
    args = GOLDConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", use_uld_loss=True,
                      teacher_tokenizer_name_or_path="x", uld_token_merge_strategy=strategy)
    ids, offsets, labels = {}, {}, {}
    for side, (tokens, spans) in text.items():
        ids[side] = torch.tensor([VOCABULARY.index(token) for token in tokens.split()])
        labels[side] = torch.cat([torch.tensor([-100]), ids[side][1:]])[None]
        offsets[side] = torch.tensor([spans])
    student, teacher = sure(ids["student"], logit).requires_grad_(), sure(ids["teacher"], 20.0)
    optimizer, measure, losses = torch.optim.Adam([student], lr=0.05), ULDLoss(args), []

    def chances(targets):
        return [round(p, 2) for p in student[0, :-1].softmax(-1).gather(1, targets[:, None])[:, 0].tolist()]

    before = chances(ids["student"][1:])
    for _ in range(steps):
        loss = measure(student, teacher, labels["student"], labels["teacher"], ids["student"][None],
                       ids["teacher"][None], offsets["student"], offsets["teacher"])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1], before, chances(ids["student"][1:]), chances(ids["student"][:-1])


for strategy, expected in (("observed", 0.5), ("bayesian", 0.0)):
    agreed = descend(TWO, strategy, 20.0, 1)[0]
    print(f"seen: {strategy}, both sure of 42.: loss {agreed:.4f}")
    assert abs(agreed - expected) < 1e-3
    first, last, before, after, again = descend(TWO, strategy, 2.0, 400)
    print(f"seen: {strategy}, learning 42.: loss {first:.3f} to {last:.3f}, P of 4, 2, ., <eos> {before} to {after}")
    print(f"seen: {strategy}, P(the token just written once more), after Q, 4, 2 and .: {again}")
    assert first > 0.8 and last < 0.01 and before == [0.6] * 4
    assert after == ([0.6, 1.0, 0.0, 1.0] if strategy == "observed" else [1.0, 1.0, 1.0, 0.6])
    assert again[2] == (1.0 if strategy == "observed" else 0.0)
    first, last, before, after, _ = descend(ONE, strategy, 2.0, 400)
    print(f"seen: {strategy}, learning 4: loss {first:.3f} to {last:.3f}, P(4), P(<eos>) {before} to {after}")
    assert last < 0.01 and after == ([0.6, 1.0] if strategy == "observed" else [1.0, 0.6])
PY
v/bin/python seen.py
