"""Tiny random checkpoints that behave like the three model families of the paper: templates, BOS, pad and EOS ids."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TURNS = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
TEMPLATES = {
    # Honours enable_thinking.
    "qwen3": TURNS + "{%- if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
    # Brings its own BOS and opens <think> whatever the flag says.
    "llama": "{{ bos_token }}{%- for m in messages %}{{ '<｜User｜>' + m.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{%- endif %}",
    # A system turn of its own, and always ends in <think>.
    "olmo3": "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    + TURNS
    + "{{ '<think>' }}{%- endif %}",
}
SPECIAL = {
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    "olmo3": {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
}
SPECIAL["llama"]["pad_token"] = SPECIAL["llama"]["eos_token"]
CORPUS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?",
    "Problem: a train runs 60 miles an hour for 3 hours; the answer is \\boxed{180}.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
)
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.3,
}  # fmt: skip


def make_tokenizer(family: str, corpus=CORPUS) -> PreTrainedTokenizerFast:
    """A byte-level BPE; the llama one adds a BOS of its own to whatever it encodes, as DeepSeek's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = sorted(set(SPECIAL[family].values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": 600, "special_tokens": names, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(**settings))
    if family == "llama":
        bos = SPECIAL["llama"]["bos_token"]
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL[family])
    wrapped.add_tokens(["<think>", "</think>", "<|im_start|>", "<｜User｜>", "<｜Assistant｜>"])
    wrapped.chat_template = TEMPLATES[family]
    return wrapped


def make_checkpoint(family: str, directory: Path, corpus=CORPUS, seed: int = 0) -> Path:
    """Save a random model of a family with its tokenizer; weights are large enough for rows to differ clearly."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(family, corpus)
    shared = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    shared |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    name, more = {
        "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
        "llama": ("Llama", {}),
        "olmo3": ("Olmo3", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    }[family]
    causal(name, **shared, **more).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def composite(name: str, tower: dict, **more) -> PreTrainedModel:
    """A random language model with a small vision tower."""
    kind = getattr(transformers, f"{name}Config")
    text = getattr(transformers, f"{name}TextConfig")(**{**SHAPE, "vocab_size": 300, "head_dim": 8, **more})
    config = kind(text_config=text.to_dict(), vision_config=tower, image_token_id=299, video_token_id=298)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def causal(name: str, **settings) -> PreTrainedModel:
    """A random language model of the library's class."""
    config = getattr(transformers, f"{name}TextConfig" if name in ("Gemma3", "Qwen3_5") else f"{name}Config")
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, head)(config(**settings))


def odd(name: str, **more) -> PreTrainedModel:
    """A random model of another family."""
    return causal(name, **{**SHAPE, "vocab_size": 300, **more})


MAMBA = {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
         "mamba_d_state": 8, "mamba_chunk_size": 16}  # fmt: skip
DELTA = {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
GEMMA_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 16, "patch_size": 8}  # fmt: skip
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 4, "num_position_embeddings": 16}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
ODD = {
    "falcon_h1_multiplier": lambda: odd("FalconH1", **MAMBA, lm_head_multiplier=0.5),
    "falcon_h1": lambda: odd("FalconH1", **MAMBA),
    "gemma3_cap": lambda: odd("Gemma3", head_dim=8, final_logit_softcapping=5.0),
    "granite_scaling": lambda: odd("Granite", logits_scaling=8.0),
    "cohere_scale": lambda: odd("Cohere", logit_scale=0.0625),
    "phi_bias": lambda: odd("Phi"),
    "mixtral": lambda: odd("Mixtral", num_local_experts=4),
    "qwen3_moe_dense": lambda: odd("Qwen3Moe", head_dim=8, **EXPERTS, mlp_only_layers=[0]),
    "qwen3_next": lambda: odd("Qwen3Next", **DELTA, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_5": lambda: odd("Qwen3_5", **DELTA),
    "gpt2": lambda: odd("GPT2", n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1),
    "phi3": lambda: odd("Phi3", pad_token_id=0),
    "qwen2": lambda: odd("Qwen2"),
    "qwen2_drops": lambda: odd("Qwen2", attention_dropout=0.1),
    "opt_drops": lambda: odd("OPT", ffn_dim=64, word_embed_proj_dim=32, dropout=0.1, layerdrop=0.5),
    "mixtral_drops": lambda: odd("Mixtral", num_local_experts=4, router_jitter_noise=0.1),
    "gemma3": lambda: composite("Gemma3", GEMMA_TOWER),
    "qwen3_5_tower": lambda: composite("Qwen3_5", QWEN_TOWER, **DELTA),
}
ODD_HEADS = ("falcon_h1_multiplier", "gemma3_cap", "granite_scaling", "cohere_scale", "phi_bias")
ODD_BLOCKS = {
    "falcon_h1": "LoRA .*mamba", "mixtral": "experts.gate_up_proj", "qwen3_moe_dense": "--lora_rank 0 trains",
    "qwen3_next": "experts", "gpt2": "c_attn",
}  # fmt: skip


def make_odd(kind: str, directory: Path) -> Path:
    """Save a random model of a family that is not the paper's, without a tokenizer."""
    torch.manual_seed(0)
    ODD[kind]().save_pretrained(directory)
    return directory


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces become a character, one is put in front, unknown characters fall back to bytes."""
    tokens = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = TEMPLATES["qwen3"]
    return wrapped
