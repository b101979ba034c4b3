#!/usr/bin/env bash
# Guess: with lmbda=1 (all answers sampled from the student) GKDTrainer's loss is the mean divergence per sampled token,
# and the reference answers in the data set, which such a step never looks at, make no difference.
# True (trl 1.16.0, transformers 5.23.0): the sum over the sampled tokens is divided by the number of REFERENCE tokens
# of the batch. Same weights, prompts, seed and samples, another length of the unused reference: loss and gradient
# change in inverse proportion, here by a factor of 50.
# Why: Trainer.get_batch_samples counts labels != -100 (num_items_in_batch) before training_step;
# GKDTrainer.training_step puts sampled labels in their place and generalized_jsd_loss still divides by the first count.
# Bites: on-policy distillation from data whose reference is only the final answer: 500 sampled tokens over 5 reference
# tokens is a loss 100 times too large. Adam and gradient clipping hide a constant factor, but batches still weigh by
# the length of text never read, and losses of two data sets, or of lmbda 0 and 1, cannot be compared.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check trl==1.16.0 transformers==5.23.0
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1
cat > seen.py <<'PY'
import string
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

print("trl", version("trl"), "transformers", version("transformers"))
vocabulary = ["<pad>", "<eos>", *string.ascii_letters, *string.digits, *" .:?\n"]  # one token a character
core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<pad>"))
core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Answer: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Answer: {% endif %}"
)
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape)
for seed, name in enumerate(["student", "teacher"]):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(name)


def on_policy_step(reference):
    """(loss, reference tokens in the batch, ids sampled) of one step with lmbda=1."""
    messages = [{"role": "user", "content": "2 plus 3?"}, {"role": "assistant", "content": reference}]
    args = GKDConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", max_steps=1, seed=0, lmbda=1.0,
                     per_device_train_batch_size=2, max_new_tokens=16)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in ("student", "teacher"))
    trainer = GKDTrainer(student, teacher, args=args, processing_class=tokenizer,
                         train_dataset=Dataset.from_list([{"messages": messages}] * 2))
    sampled, make = [], trainer.generate_on_policy_outputs
    trainer.generate_on_policy_outputs = lambda *inputs: sampled.append(make(*inputs)) or sampled[-1]
    tokens = (next(iter(trainer.get_train_dataloader()))["labels"][:, 1:] != -100).sum().item()
    torch.manual_seed(0)
    trainer.train()
    ids, _, labels = sampled[0]
    return trainer.state.log_history[-1]["train_loss"], tokens, ids[labels != -100].tolist()


loss, tokens, ids = on_policy_step("5")
long_loss, long_tokens, long_ids = on_policy_step("5" * 100)
assert ids == long_ids, "the two steps sampled different answers"
print(f"seen: the same {len(ids)} sampled tokens in both steps")
print(f"seen: {tokens} reference tokens: loss {loss:.6f}; {long_tokens}: loss {long_loss:.6f}")
print(f"seen: loss x reference tokens {loss * tokens:.6f} and {long_loss * long_tokens:.6f}")
assert long_tokens > 40 * tokens
assert abs(loss * tokens / (long_loss * long_tokens) - 1) < 1e-3
PY
v/bin/python seen.py
