#!/usr/bin/env bash
# Guess: with teacher_model_kind="base" the teacher of TRL's SDFTTrainer is the model that was handed in, frozen, and it
# reads its whole prompt (question and privileged solution); one that is too long is an error.
# True (trl 1.16.0): for a model without PEFT the teacher is read again from the folder or hub name that the model came
# from. Changes made in memory (a merged adapter, resized or patched weights) are the student's only: the teacher is
# another model from step 0, though the trainer's own docstring says "frozen deepcopy of the initial student".
# And teacher prompts are cut from the left to max_prompt_length = 512 tokens without a word: a long solution pushes
# the question and the chat header out, so the teacher scores the answer without having seen what was asked.
# Why: SDFTTrainer._setup_teacher_model calls create_model_from_path(model.config's name), and _tokenize_prompts keeps
# ids[-max_prompt_length:] of student and teacher prompts alike.
# Bites: self-distillation after a merge in the same script, and reference solutions of ordinary length (a few hundred
# words of mathematics). Save and load the model first; set max_prompt_length to what the longest solution needs.
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
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

print("trl", version("trl"), "transformers", version("transformers"))
vocabulary = ["<pad>", "<eos>", *string.ascii_letters, *string.digits, *" .:?\n"]  # one token a character
core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<pad>"))
core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
tokenizer.chat_template = "{% for m in messages %}User: {{ m.content }}\n{% endfor %}Answer: "

shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape)
AutoModelForCausalLM.from_config(config).save_pretrained("saved")
model = AutoModelForCausalLM.from_pretrained("saved")
with torch.no_grad():
    model.model.layers[0].mlp.down_proj.weight.mul_(2.0)  # stands for a merged adapter
initial = {name: value.clone() for name, value in model.state_dict().items()}

question, solution = "What is 2 plus 3?", "Add them. " * 60 + "It is 5."
row = {"prompt": [{"role": "user", "content": question}], "privileged_context": solution}
args = SDFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", num_generations=1, max_steps=1,
                  per_device_train_batch_size=1, gradient_accumulation_steps=1, generation_batch_size=1,
                  distillation_mode="full_logits")
trainer = SDFTTrainer(model, args, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)

saved = AutoModelForCausalLM.from_pretrained("saved").state_dict()
teacher = trainer.teacher_model.state_dict()
as_given = all(torch.equal(value, initial[name]) for name, value in teacher.items())
as_saved = all(torch.equal(value, saved[name]) for name, value in teacher.items())
print(f"seen: the teacher's weights are those of the model as given: {as_given}, of the files: {as_saved}")
assert (as_given, as_saved) == (False, True)

seen_prompts = []


class Watch(torch.nn.Module):  # the teacher's inputs, as the trainer's own step makes them
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        seen_prompts.append(inputs["input_ids"][0])
        return self.inner(**inputs)


trainer.teacher_model = Watch(trainer.teacher_model)
trainer.train()
prompt = seen_prompts[0][: args.max_prompt_length]
text = tokenizer.decode(prompt)
print(f"seen: of the teacher's prompt {len(prompt)} tokens are left: {text[:20]!r} ... {text[-20:]!r}")
assert text.endswith("It is 5.\nAnswer: ") and "2 plus 3" not in text and "User:" not in text
PY
v/bin/python seen.py
