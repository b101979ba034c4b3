#!/usr/bin/env bash
# Guess: a request to `transformers serve` with "temperature": 1.0 and another "seed" each time gets another sample each
# time, as from any other server of that interface.
# True (transformers 5.23.0): whether anything is sampled is the checkpoint's affair. Without "do_sample": true in its
# generation_config.json, which most base models lack, all seeds get the same text: the greedy one. The temperature is
# taken, stored and never used.
# Why: BaseHandler._build_generation_config (transformers/cli/serving/utils.py) sets `temperature` from the request, and
# `do_sample` only to False, for a temperature of 0. Passing {"do_sample": true, ...} as the field `generation_config`
# samples; so does do_sample in the checkpoint.
# Bites: Avg@N, Pass@N and majority votes through such a server: N equal answers, Pass@N = Avg@N, no spread over seeds;
# on-policy training through it sees greedy rollouts.
set -euo pipefail
T=$(mktemp -d) && trap 'kill $SERVER 2>/dev/null || true; rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check "transformers[serving]==5.23.0"
export HF_HUB_OFFLINE=1
cat > make.py <<'PY'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
words = {word: i for i, word in enumerate(["<s>", "</s>", "[UNK]", *(f"w{i}" for i in range(200))])}
inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained("model")
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=1, **shape))
model.save_pretrained("model")
PY
v/bin/python make.py
PORT=$(v/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
v/bin/transformers serve "$T/model" --host 127.0.0.1 --port "$PORT" --device cpu >log 2>&1 &
SERVER=$!
cat > seen.py <<'PY'
import json
import sys
import time
import urllib.request

import transformers

print("transformers", transformers.__version__)
URL, MODEL = sys.argv[1:]


def ask(**fields):
    body = json.dumps({"model": MODEL, "prompt": "w5 w6 w7", "max_tokens": 8, "temperature": 1.0, **fields}).encode()
    request = urllib.request.Request(f"{URL}/v1/completions", body, {"Content-Type": "application/json"})
    for _ in range(90):
        try:
            return json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            raise SystemExit(error.read().decode())
        except OSError:
            time.sleep(1)  # it is still starting
    raise SystemExit("the server has not started")


plain = {ask(seed=seed) for seed in range(8)}
own = json.dumps({"do_sample": True, "max_new_tokens": 8, "eos_token_id": 1})
asked = {ask(seed=seed, generation_config=own) for seed in range(8)}
print(f"seen: temperature 1.0, eight seeds: {len(plain)} different text(s); with do_sample true: {len(asked)}")
assert len(plain) == 1 and len(asked) == 8
PY
v/bin/python seen.py "http://127.0.0.1:$PORT" "$T/model"
