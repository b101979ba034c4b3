#!/usr/bin/env bash
# Guess: with apply_chat_template OpenRLHF trains on the text that the template makes of question and answer: all that
# stands behind the question there, and nothing else.
# True (openrlhf 0.11.2; the template of the DeepSeek-R1 distills as trl 1.16.0 ships it): for a template that ends the
# prompt on "<think>" and writes answers without their thoughts the first eight characters of every answer are cut off.
# "<think>13 + 29 = 42.</think>The answer is 42." is trained as "<think>\ner is 42.", \boxed{42} as "<think>\n2}", and
# of 42 nothing is left, nor of the first half of the end token behind it. Every answer is taught as a thought that is
# never closed. With the templates of Qwen2.5, Qwen3 and Qwen3.5 (with thoughts) the text is the template's own.
# Why: preprocess_data (openrlhf/datasets/sft_dataset.py) makes the prompt with add_generation_prompt=True and takes
# what the whole conversation has from that length on, [len(prompt):], without asking whether it begins with the prompt.
# <think> and a line break are eight characters. preprocess_data of reward_dataset.py, for DPO, does so too (by its
# source): both answers of a pair lose their beginnings, which may be all in which they differ.
# Bites: supervised fine-tuning and DPO of R1 distills, and of other models with such a template, on mathematics: short
# answers vanish, long ones lose their first word. The loss is finite and falls. (The packages' __init__.py, which
# import all of openrlhf, are passed by.)
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check transformers==5.23.0 datasets==5.2.0 jinja2
v/bin/pip install -q --disable-pip-version-check --no-deps openrlhf==0.11.2 trl==1.16.0
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

disable_progress_bars()
print("openrlhf", version("openrlhf"), "trl", version("trl"))
root = Path(importlib.util.find_spec("openrlhf").origin).parent
for name in ("utils", "datasets"):  # these packages without their __init__.py
    package = sys.modules["openrlhf." + name] = ModuleType("openrlhf." + name)
    package.__path__ = [str(root / name)]
from openrlhf.datasets.sft_dataset import SFTDataset

templates = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
strategy = SimpleNamespace(
    args=SimpleNamespace(data=SimpleNamespace(input_key="question", output_key="answer", apply_chat_template=True))
)


def trained(template, eos, answer):
    """The text on which there is a loss, and what the template writes behind the question."""
    vocabulary = ["<pad>", eos, *sorted(ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=eos)
    tokenizer.chat_template = (templates / template).read_text()
    question = "What is 13 + 29?"
    rows = SFTDataset(Dataset.from_list([{"question": question, "answer": answer}]), tokenizer, 4096, strategy,
                      num_processors=1)
    ids, _, mask = rows[0]
    learned = [token for token, on in zip(ids[0, 1:].tolist(), mask[0].tolist()) if on]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    behind = whole.split(question)[1]
    read = tokenizer.decode(ids[0]).split(question)[1]
    return tokenizer.decode(learned).replace(eos, "").strip(), behind, read


R1, IM = "<｜end▁of▁sentence｜>", "<|im_end|>"
for template, eos, answer, learned in (
    ("deepseek_r1_distill.jinja", R1, "<think>13 + 29 = 42.</think>The answer is 42.", "er is 42."),
    ("deepseek_r1_distill.jinja", R1, r"\boxed{42}", "2}"),
    ("deepseek_r1_distill.jinja", R1, "42", "of▁sentence｜>"),
    ("qwen2_5.jinja", IM, r"\boxed{42}", r"\boxed{42}"),
    ("qwen3.jinja", IM, r"<think>13 + 29.</think>\boxed{42}", "<think>\n13 + 29.\n</think>\n\n\\boxed{42}"),
    ("qwen3_5_think.jinja", IM, r"<think>13 + 29.</think>\boxed{42}", "13 + 29.\n</think>\n\n\\boxed{42}"),
):
    got, behind, read = trained(template, eos, answer)
    print(f"seen: {template}: the template writes {behind!r}; the model reads {read!r} and learns {got!r}")
    assert got == learned
    assert (read.replace(eos, "").strip() == behind.replace(eos, "").strip()) == ("r1" not in template)
PY
v/bin/python seen.py
