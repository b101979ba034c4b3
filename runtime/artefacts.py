"""What is left for others to use: whole checkpoints with all that belongs to them, and files that others may read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from model import find_checkpoint


def save_whole(model: PreTrainedModel, base: str, directory: Path) -> None:
    """Write a model as a checkpoint of its own, with the tokenizer, template and sampling defaults of its base."""
    base = find_checkpoint(base)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(directory)
    defaults = cached_file(base, GENERATION, _raise_exceptions_for_missing_entries=False)
    if defaults is not None:  # as it is: a base's defaults need not be valid in the eyes of this version
        shutil.copyfile(defaults, directory / GENERATION)


GENERATION = "generation_config.json"


def open_to_readers(directory: Path) -> None:
    """Give each file the mode that the umask asks for (0666 without it): weights are written readable to one user."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
