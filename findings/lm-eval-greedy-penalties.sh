#!/usr/bin/env bash
# Guess: a task of lm-eval with do_sample: false and temperature 0 scores plain greedy decoding, the likeliest token each
# time, whatever sampling defaults the checkpoint ships.
# True (lm-eval 0.4.13, transformers 5.23.0): with --model hf the repetition_penalty (and no_repeat_ngram_size, its like)
# of the checkpoint's generation_config.json stays in force, and the answers are others. Naming repetition_penalty: 1.0
# in the task's generation_kwargs gives greedy decoding. Temperature, top_k and top_p have no part in it.
# Why: HFLM._model_generate hands generate() the task's generation_kwargs only; what they do not name is filled in from
# model.generation_config, and do_sample=False switches off sampling, not logits processors.
# Bites: Qwen2.5-Instruct and its children ship 1.05 to 1.1: mathematics repeats its numbers, so greedy accuracy of
# lm-eval is lower than of a harness that decodes without it, and a tuned child saved without that file seems to gain.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check lm-eval==0.4.13 transformers==5.23.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cat > seen.py <<'PY'
import string
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

print("lm-eval", version("lm-eval"), "transformers", version("transformers"))
names = ["<pad>", "<eos>", *string.ascii_letters, *string.digits, *" .:?+="]  # one token a character
core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(names)}, unk_token="<pad>"))
core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(
    vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    initializer_range=0.3,
)).eval()
model.generation_config.repetition_penalty = 1.1
model.save_pretrained("m")
PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained("m")
harness = HFLM(pretrained="m", device="cpu", dtype="float32", batch_size=1)
prompts = ["1+2=", "What is 3+4?", "7+7=14. 14+1="]


def answers(**more):
    settings = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 24, "until": ["<none>"], **more}
    jobs = [Instance("generate_until", {}, (prompt, dict(settings)), i) for i, prompt in enumerate(prompts)]
    return harness.generate_until(jobs, disable_tqdm=True)


def likeliest(prompt):
    ids = harness.tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + 24 and ids[0, -1] != 1:
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return harness.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


greedy, silent, named = [likeliest(prompt) for prompt in prompts], answers(), answers(repetition_penalty=1.0)
for prompt, *rows in zip(prompts, greedy, silent, named):
    print(f"seen: {prompt!r}: likeliest tokens {rows[0]!r}, task {rows[1]!r}, with repetition_penalty 1.0 {rows[2]!r}")
assert named == greedy, "with the penalty named off it is plain greedy decoding"
assert silent[0] != greedy[0] and silent[1] != greedy[1], "left unsaid, it is not"
PY
v/bin/python seen.py
