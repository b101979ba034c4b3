"""Make the embedded model: a small Qwen3 that adds, slips, sometimes notices, and listens to a reference solution.

    python -m experiments.make_tiny_model --output tiny

What makes its teacher context worth listening to is that it has seen student-like mistakes. Without a
reference a trace slips (a wrong partial sum) on 25 % of its steps and takes back 30 % of the slips with a `!`; with a
reference in the prompt it slips as often, always takes it back, and the slip itself carries no loss. The result is
saved in the ordinary Hugging Face layout.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from problems import Problem, tiny_problems
from teacher import (
    DIAGNOSTIC_PROMPT,
    EVALUATION_PROMPT,
    FIELD,
    STUDENT_PROMPT,
    TEACHER_PROMPT,
    encode_prompt,
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character and one per phrase of the prompt templates, so that prompts stay short."""
    characters = ["<unk>", *(chr(code) for code in range(32, 127)), "\n"]
    model = models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    templates = (STUDENT_PROMPT, TEACHER_PROMPT, EVALUATION_PROMPT, DIAGNOSTIC_PROMPT)
    phrases = [part for template in templates for part in FIELD.split(template)[::2] if part]
    wrapped.add_tokens(
        ["<|im_start|>", "user\n", "assistant\n", "<think>\n\n</think>\n\n", "\\boxed{", *dict.fromkeys(phrases)]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def trace(problem: Problem, draw: random.Random, slip: float, retract: float) -> list[tuple[str, bool]]:
    """A solution in a random order as (text, carries loss) pieces, with slips and retractions (`8+3=12!8+3=11;`)."""
    left = [int(addend) for addend in problem.problem.split("+")]
    draw.shuffle(left)
    total, pieces = left.pop(), []
    while left:
        addend = left.pop()
        right = total + addend
        if draw.random() < slip:
            wrong = max(1, right + draw.choice((-10, -2, -1, 1, 2, 10)))
            keeps = draw.random() >= retract
            pieces += [(f"{total}+{addend}=", True), (str(wrong), retract < 1.0), (";" if keeps else "!", True)]
            if keeps:
                total = wrong
                continue
        pieces.append((f"{total}+{addend}={right};", True))
        total = right
    return [*pieces, (f"\\boxed{{{total}}}", True)]


def example(tokenizer, problem: Problem, draw: random.Random, contexts: list) -> tuple[list[int], list[int]]:
    """Token ids and labels of one training sequence in a context drawn at random."""
    template, thinking, slip, retract = draw.choice(contexts)
    prompt = encode_prompt(tokenizer, template, problem, enable_thinking=thinking)
    ids, labels = list(prompt), [IGNORED] * len(prompt)
    for text, carries_loss in trace(problem, draw, slip, retract):
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if carries_loss else [IGNORED] * len(piece)
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def batch_tensors(examples: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in examples])
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="tiny", help="directory to write")
    parser.add_argument("--start", default=None, help="an earlier result to go on from")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--student_slip", type=float, default=0.25, help="share of steps with a wrong sum")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, rope_theta=10000.0,
    )  # fmt: skip
    model = Qwen3ForCausalLM.from_pretrained(args.start) if args.start else Qwen3ForCausalLM(config)
    model.train()
    problems = tiny_problems("train", count=20_000, seed=1)
    student = (STUDENT_PROMPT, False, args.student_slip, 0.30)
    evaluation = (EVALUATION_PROMPT, True, args.student_slip, 0.30)
    teacher = (TEACHER_PROMPT, True, 0.25, 1.0)
    diagnostic = (DIAGNOSTIC_PROMPT, True, 0.25, 1.0)
    contexts = [student, evaluation, teacher, teacher, diagnostic]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, args.steps)
    start = time.time()
    for step in range(args.steps):
        rows = [example(tokenizer, draw.choice(problems), draw, contexts) for _ in range(args.batch_size)]
        ids, labels = batch_tensors(rows, tokenizer.pad_token_id)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"saved {size:,} parameters to {args.output}")


if __name__ == "__main__":
    main()
