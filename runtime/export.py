"""Export: base + adapter as one ordinary checkpoint.

python -m runtime.export --adapter runs/qwen3-4b/checkpoint-100 --output_dir runs/merged
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from errors import InputError
from model import ADAPTER_CONFIG, DTYPES, load_config, load_model, load_tokenizer, lora_layers
from runtime.adapters import load_adapter
from runtime.artefacts import open_to_readers, save_whole
from runtime.checkpoint import cannot_be_written
from runtime.flags import run_script


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> None:
    """Fold the adapter into plain linear layers, in place and for export only: W + (alpha / r) B A in float32."""
    for name, layer in lora_layers(model).items():
        update = (layer.lora_B.float() @ layer.lora_A.float()) * (layer.alpha / layer.rank)
        layer.base.weight.copy_(layer.base.weight.float() + update)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


MERGE_TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order, nothing more


def export(adapter: str, output: str, base: str | None = None, dtype: str = "auto") -> float:
    """Write base + adapter as one ordinary checkpoint; returns the largest logit difference to the unmerged model.

    Merging and checking are done in float32, on the CPU. `dtype` is that of the file: auto (the base checkpoint's) or
    its name; rounding to it comes last. Raises InputError, with nothing written, for a bad adapter or output.
    """
    directory = Path(adapter)
    if not directory.is_dir():
        raise InputError(f"--adapter {adapter}: no such directory")
    if base is None:
        try:
            base = json.loads((directory / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError):
            raise InputError(
                f"--adapter {adapter}: no {ADAPTER_CONFIG} that names the base model; pass --model"
            ) from None
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise InputError(f"--output_dir {output}: is not a new or empty directory")
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"--dtype {dtype}: choose one of auto, {', '.join(DTYPES)}")
    model, tokenizer = load_model(base, "float32", device="cpu").eval(), load_tokenizer(base)
    load_adapter(model, directory)
    ids = torch.tensor([tokenizer.encode("Problem: 1+2+3\n\nPlease reason step by step.", add_special_tokens=False)])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merge_adapter(model)
        difference = (model(input_ids=ids).logits - before).abs().max().item()
    if not difference <= MERGE_TOLERANCE * before.abs().max().item():
        raise InputError(f"--adapter {adapter}: merged and unmerged logits differ by {difference:.2e}; nothing written")
    stored = load_config(base).dtype or torch.float32
    model.to(stored if dtype == "auto" else getattr(torch, dtype))
    write_whole(model, base, Path(output))
    return difference


def write_whole(model: PreTrainedModel, base: str, output: Path) -> None:
    """Write a checkpoint that appears only when it is complete. Raises InputError, with nothing left, if it cannot."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_whole(model, base, partial)
        open_to_readers(partial)
        partial.replace(output)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not cannot_be_written(error):
            raise
        raise InputError(f"--output_dir {output}: cannot be written ({str(error).splitlines()[0]})") from error


def main() -> None:
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="directory with adapter_config.json")
    parser.add_argument("--output_dir", required=True, help="new directory for the merged checkpoint")
    parser.add_argument("--model", default=None, help="base model; default: the one that the adapter names")
    parser.add_argument("--dtype", default="auto", help="auto (the base's own), float32, bfloat16 or float16")
    args = parser.parse_args()
    difference = export(args.adapter, args.output_dir, args.model, args.dtype)
    print(f"wrote {args.output_dir}; largest logit difference to base + adapter: {difference:.2e}")


if __name__ == "__main__":
    run_script(main)
