#!/usr/bin/env bash
# Guess: how GOLDTrainer's batch is split (per_device_train_batch_size x gradient_accumulation_steps) is a matter of
# memory: the same rows in one step have the same loss and gradient.
# True (trl 1.16.0, transformers 5.23.0): with n accumulation steps the loss and the gradient of the default loss (JSD)
# are divided by n, those of the loss for two tokenizers (use_uld_loss=True) multiplied by n. The same eight rows as
# 8 x 1, 4 x 2, 2 x 4 and 1 x 8: JSD .275, .137, .069, .034; ULD .589, 1.178, 2.356, 4.712.
# Why: GOLDTrainer.get_train_dataloader hands every one of the n micro-steps all n micro-batches, from which
# _prepare_inputs takes a slice, but Trainer.get_batch_samples counts the tokens of all n copies, and
# generalized_jsd_loss divides by that count. ULDLoss takes a mean and is given no count; Trainer.training_step divides
# by n only what was not scaled already, and it believes that of any loss whose model takes keyword arguments
# (loss_is_scaled_for_ga, which trl's DistillationTrainer, DPOTrainer and GRPOTrainer set and GOLDTrainer leaves None).
# Bites: losses of two runs that reach the same batch by other splits (two machines, one with less memory) cannot be
# compared, and a JSD curve that looks eight times better is the same. max_grad_norm, 1 by default, cuts ULD steps n
# times too early and JSD steps n times too late; Adam hides the rest.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check trl==1.16.0 transformers==5.23.0
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1
cat > seen.py <<'PY'
from importlib.metadata import version

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, PrinterCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer

disable_progress_bars()
print("trl", version("trl"), "transformers", version("transformers"))


def save(name, seed, merges):
    """A byte-level tokenizer, and a tiny random model for it, in the folder `name`."""
    vocabulary = ["<pad>", "<eos>", *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Answer: ' }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Answer: {% endif %}"
    )
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(name)
    tokenizer.save_pretrained(name)
    return tokenizer


tokenizer = save("student", 0, [])
save("teacher", 1, [])
save("other-teacher", 2, [(a, b) for a in "123456789" for b in "0123456789"])  # two digits are one token
ROWS = [[{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}."}]
        for i in range(10, 18)]


def step(rows, accumulation, uld):
    """Loss and gradient norm of one step over all of ROWS."""
    teacher = "other-teacher" if uld else "teacher"
    args = GOLDConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1,
                      logging_steps=1, lmbda=0.0, per_device_train_batch_size=rows, max_grad_norm=1e9,
                      gradient_accumulation_steps=accumulation, use_uld_loss=uld,
                      teacher_tokenizer_name_or_path=teacher if uld else None)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in ("student", teacher))
    trainer = GOLDTrainer(student, teacher, args=args, processing_class=tokenizer,
                          train_dataset=Dataset.from_list([{"messages": row} for row in ROWS]))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return next((log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log)


for uld, name in ((False, "JSD, one tokenizer"), (True, "ULD, two tokenizers")):
    right, right_norm = step(8, 1, uld)
    for n in (1, 2, 4, 8):
        loss, norm = step(8 // n, n, uld)
        print(f"seen: {name}, {8 // n} x {n}: loss {loss:.4f}, gradient norm {norm:.4f}; "
              f"of those of 8 x 1: {loss / right:.3f}, {norm / right_norm:.3f}")
        factor = n if uld else 1 / n
        assert abs(loss / right / factor - 1) < 1e-3 and abs(norm / right_norm / factor - 1) < 1e-3
PY
v/bin/python seen.py
