#!/usr/bin/env bash
# Guess: `transformers serve` takes OpenAI's frequency_penalty as OpenAI does, alpha off a token's logit for each
# time that it was sampled, or refuses the field, or leaves it out with a warning.
# True (transformers 5.23.0): it is taken for another penalty. The logit of every token that occurs in the PROMPT or in
# the answer is divided by 1 + alpha (multiplied, where it is negative), once, however often it occurs. A number that
# the question names is pushed down from the first token on. A loop goes on for ever, since no repetition counts twice.
# And two checkpoints whose logits differ by a constant, with the same probabilities, answer differently.
# Why: _build_generation_config in transformers/cli/serving/completion.py and chat_completion.py sets repetition_penalty
# = 1.0 + frequency_penalty; RepetitionPenaltyLogitsProcessor (generation/logits_process.py) does the rest. Its range is
# 1.0 to about 1.2, OpenAI's -2 to 2. No warning, neither in the answer nor in the server's log.
# Bites: mathematics, which repeats the numbers of its question: .2, mild elsewhere, takes 1.7 off a logit of 10 at the
# first occurrence. A model compared over two servers with "the same" sampling parameters answers worse here. And who
# sends the field against endless repetition still gets the repetition.
set -euo pipefail
T=$(mktemp -d) && trap 'kill $SERVER 2>/dev/null || true; rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check "transformers[serving]==5.23.0"
export HF_HUB_OFFLINE=1
cat > make.py <<'PY'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<s>", "</s>", "[UNK]", "12", "13", *(f"w{i}" for i in range(20))])}
logits = torch.tensor([-30.0, -30.0, -30.0, 10.0, 9.5, *(3 - 0.05 * i for i in range(20))])  # at every position
shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
for name, shift in {"plain": 0.0, "shifted": 40.0}.items():
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(name)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=1, **shape))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)  # every token is embedded alike, so the head sees ones
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_((logits + shift)[:, None].expand(-1, 32) / 32)
    model.save_pretrained(name)
PY
v/bin/python make.py
PORT=$(v/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
v/bin/transformers serve --host 127.0.0.1 --port "$PORT" --device cpu >log 2>&1 &
SERVER=$!
cat > seen.py <<'PY'
import json
import sys
import time
import urllib.request

import transformers

print("transformers", transformers.__version__)
URL, HOME = sys.argv[1:]


def ask(prompt, penalty, model="plain"):
    body = {"model": f"{HOME}/{model}", "prompt": prompt, "max_tokens": 8, "temperature": 0.0}
    body = json.dumps(body | {"frequency_penalty": penalty}).encode()
    request = urllib.request.Request(f"{URL}/v1/completions", body, {"Content-Type": "application/json"})
    for _ in range(90):
        try:
            return json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"].strip()
        except urllib.error.HTTPError as error:
            raise SystemExit(error.read().decode())
        except OSError:
            time.sleep(1)  # it is still starting
    raise SystemExit("the server has not started")


def by_definition(penalty):
    """Greedy over the same logits with OpenAI's rule: alpha times the count among the sampled tokens, off the logit."""
    logits = {"12": 10.0, "13": 9.5} | {f"w{i}": 3 - 0.05 * i for i in range(20)}
    text = []
    for _ in range(8):
        text.append(max(logits, key=lambda word: logits[word] - penalty * text.count(word)))
    return " ".join(text)


CASES = {  # prompt, penalty, model -> what the server says
    ("w5 w6 w7", 0.0, "plain"): "12 12 12 12 12 12 12 12", ("w5 12 w7", 0.0, "plain"): "12 12 12 12 12 12 12 12",
    ("w5 w6 w7", 0.2, "plain"): "12 13 12 12 12 12 12 12", ("w5 12 w7", 0.2, "plain"): "13 12 12 12 12 12 12 12",
    ("w5 12 w7", 2.0, "plain"): "13 12 12 12 12 12 12 12", ("w5 12 w7", 0.2, "shifted"): "13 w0 w1 w2 w3 w4 w6 w8",
}
for (prompt, penalty, model), expected in CASES.items():
    text = ask(prompt, penalty, model)
    print(f"seen: after {prompt!r}, frequency_penalty {penalty}, {model}: {text!r}, by OpenAI's rule "
          f"{by_definition(penalty)!r}")
    assert text == expected and (text == by_definition(penalty)) == (penalty == 0)
log = open("log").read()
assert "repetition" not in log and "frequency" not in log and "Ignoring" not in log
PY
v/bin/python seen.py "http://127.0.0.1:$PORT" "$T"
