"""Make the model of a world (experiments/study/worlds.py): a small Qwen3 in the ordinary Hugging Face layout.

    python -m experiments.make_world --world embedded --output_dir tiny-model     from scratch, 28 minutes
    python -m experiments.make_world --world leap --dose 0.2                      12 minutes
    python -m experiments.make_world --world leak                                 13 minutes
    python -m experiments.make_world --world placed-12 --seed 1                   7 minutes

Times are of one CPU core. `embedded` is the model that ships with the project (byte for byte with torch 2.13 on
x86-64). The others learn on from it and write model/, train.jsonl and heldout.jsonl into runs/worlds/leak or, with the
dose (the teacher's chance to leap), runs/worlds/leap-0.4, where the study's grids look for them.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

from errors import InputError
from experiments.study.worlds import WORLDS, World, trace
from problems import Problem, tiny_problems
from runtime.flags import run_script
from runtime.loading import load_model, load_tokenizer
from runtime.records import make_folder
from teacher import DIAGNOSTIC_PROMPT, EVALUATION_PROMPT, FIELD, STUDENT_PROMPT, TEACHER_PROMPT, encode_prompt

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
IGNORED = -100
MICRO_BATCH = 16
MARK = "WORLD"  # a file of this name makes a folder ours
SPLITS = {"train": 2000, "heldout": 400}  # problems written
# (prompt, thinking, knows the reference or the answer), drawn in equal shares
CONTEXTS = [(STUDENT_PROMPT, False, False), (EVALUATION_PROMPT, True, False)]
CONTEXTS += [(TEACHER_PROMPT, True, True), (DIAGNOSTIC_PROMPT, True, True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character and one per phrase of the prompt templates, so that prompts stay short."""
    characters = ["<unk>", *(chr(code) for code in range(32, 127)), "\n"]
    vocabulary = {character: i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    templates = (STUDENT_PROMPT, TEACHER_PROMPT, EVALUATION_PROMPT, DIAGNOSTIC_PROMPT)
    phrases = dict.fromkeys(part for template in templates for part in FIELD.split(template)[::2] if part)
    marks = ["<|im_start|>", "user\n", "assistant\n", "<think>\n\n</think>\n\n", "\\boxed{"]
    wrapped.add_tokens([*marks, *phrases])
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """0.8 M parameters, untrained."""
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, rope_theta=10000.0,
    ))  # fmt: skip


Example = tuple[list[int], list[int]]


def example(tokenizer: PreTrainedTokenizerBase, problem: Problem, draw: random.Random, world: World) -> Example:
    """Token ids and labels of one training sequence, in a context drawn at random."""
    template, thinking, teacher = draw.choice(CONTEXTS)
    ids = encode_prompt(tokenizer, template, problem, enable_thinking=thinking)
    labels = [IGNORED] * len(ids)
    for text, carries_loss in [*trace(problem, draw, world, teacher), (tokenizer.eos_token, True)]:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if carries_loss else [IGNORED] * len(piece)
    return ids, labels


def padded(rows: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, each [B, T]."""
    ids, labels = ([torch.tensor(row) for row in column] for column in zip(*rows, strict=True))
    return pad_sequence(ids, True, pad), pad_sequence(labels, True, IGNORED)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, world: World, stage: int, seed: int = 0) -> None:
    """One stage of supervised steps on solutions of the world, drawn by the seed, in place."""
    num_steps, learning_rate = world.stages[stage]
    if world.guess and stage == 0:  # what stands behind `~`, learned where there are many
        world = replace(world, guess=0.4, teacher_guess=0.4, placed="123456")
    draw = random.Random(10 * seed + stage)
    problems = tiny_problems("train", 20_000, seed=1, num_addends=world.num_addends)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = cosine_schedule(optimizer, 50, num_steps)
    model.train()
    begin = time.time()
    for step in range(num_steps):
        rows = [example(tokenizer, draw.choice(problems), draw, world) for _ in range(world.batch_size)]
        rows.sort(key=lambda row: len(row[0]))  # rows of one context are about as long: little is padded
        count = sum(label != IGNORED for _, labels in rows for label in labels)
        loss = 0.0
        for start in range(0, len(rows), MICRO_BATCH):
            ids, labels = padded(rows[start : start + MICRO_BATCH], tokenizer.pad_token_id)
            part = model(input_ids=ids, labels=labels, num_items_in_batch=count).loss  # a sum over this count
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps - 1:
            print(f"step {step:5d}  loss {loss:.4f}  {time.time() - begin:.0f} s", flush=True)


def write_problems(world: World, folder: Path) -> None:
    """train.jsonl and heldout.jsonl; no held-out sum occurs in training in any order.

    In worlds `placed` one half of the held-out sums is for validation, and each of the final half is there four times.
    """
    splits = {name: tiny_problems(name, n, num_addends=world.num_addends) for name, n in SPLITS.items()}
    if world.guess:
        half = SPLITS["heldout"] // 2
        splits |= {"validation": splits["heldout"][:half], "final": 4 * splits["heldout"][half:]}
    for split, problems in splits.items():
        rows = [{name: getattr(problem, name) for name in ("problem", "solution", "answer")} for problem in problems]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def claim(folder: Path, made: str) -> None:
    """Make the folder before the slow work, and write `made` into it, as what makes it ours; its seed stands there too.

    Raises InputError where that fails, or the folder holds files of somebody else, or another world.
    """
    others, mark = sorted(path.name for path in make_folder(folder).iterdir()), folder / MARK
    there = mark.read_text().strip() if mark.is_file() else ""
    if others and there != made:
        holds = f"holds {there}, not {made}" if there else f"is not empty and has no file {MARK} ({others[0]} is there)"
        raise InputError(f"--output_dir {folder}: {holds}")
    mark.write_text(made + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True, choices=WORLDS)
    parser.add_argument("--dose", type=float, help="the teacher's chance of an early leap (world leap; default 0.4)")
    parser.add_argument("--seed", type=int, default=0, help="of the solutions learned from: another base model")
    parser.add_argument("--output_dir", type=Path, help="default: runs/worlds/WORLD-DOSE-seedSEED, as far as given")
    args = parser.parse_args()
    world = WORLDS[args.world]
    if args.dose is not None:
        if not world.teacher_leap or not 0.0 <= args.dose <= 1.0:
            raise InputError(f"--dose {args.dose}: a chance in [0, 1], of --world leap only")
        world = replace(world, teacher_leap=args.dose)
    name = f"{args.world}-{world.teacher_leap}" if WORLDS[args.world].teacher_leap else args.world
    name += f"-seed{args.seed}" if args.seed else ""
    output = args.output_dir or Path("runs/worlds") / name

    claim(output, f"world {args.world}, dose {world.teacher_leap}, seed {args.seed}")
    torch.manual_seed(args.seed)
    if world.from_scratch:
        tokenizer, folder = make_tokenizer(), output
        model = make_model(tokenizer)
    else:
        model, tokenizer, folder = load_model("tiny", device="cpu"), load_tokenizer("tiny"), output / "model"
        write_problems(world, output)
    for stage in range(len(world.stages)):
        train(model, tokenizer, world, stage, args.seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(main)
