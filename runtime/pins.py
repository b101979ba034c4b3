"""Pins: what a run or a sample depends on, by content, so that nothing changes under its name without a word."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple
from pathlib import Path

from transformers.utils import cached_file

from errors import InputError, one_line
from model import find_checkpoint
from problems import Problem
from runtime.ranks import gather_objects, rank
from teacher import load_prompts

# Weights of every format and their indices, configs, generation defaults, tokenizers, templates, adapters.
PINNED = {
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".json", ".jinja", ".txt", ".model", ".tiktoken",
}  # fmt: skip
# What stands beside them in a checkpoint and decides nothing that is sampled.
UNPINNED = {
    "trainer_state.pt", "trainer_state.json", "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin",
    "scheduler.pt", "scaler.pt", "manifest.json", "ema.safetensors", "requirements.txt", "all_results.json",
    "train_results.json", "eval_results.json",
}  # fmt: skip


def fingerprint(name: str) -> dict[str, str]:
    """SHA-256 of each file that decides what a directory's model samples, by name; for a hub name its revision.

    Files are hashed whole and anew each time, several at once: size and time of a file survive a change of its content
    (`cp -p`, `rsync -t`, an archive). A GiB takes about a second where the CPU has SHA instructions, up to 6 without.
    """
    directory = Path(name)
    if not directory.is_dir():
        return {"revision": revision(name)}
    paths = sorted([*directory.iterdir(), *directory.glob("additional_chat_templates/*")])
    paths = [
        path for path in paths
        if path.suffix in PINNED and path.name not in UNPINNED and not path.name.startswith("rng_state")
        and path.is_file()
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, paths))
    return {path.relative_to(directory).as_posix(): digest for path, digest in zip(paths, digests, strict=True)}


def revision(name: str) -> str:
    """The commit of a hub model, as it would be loaded now."""
    try:
        path = cached_file(name, "config.json")
    except Exception as error:  # the hub's errors have no common base class
        raise InputError(f"--model {name}: cannot be read ({one_line(error)})") from error
    found = SNAPSHOT.search(Path(path).as_posix())
    if found is None:
        raise InputError(f"--model {name}: the hub names no revision of it; download it and pass the directory")
    return found[1]


SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")  # where the hub's cache keeps the files of a commit


def model_pin(name: str) -> dict[str, str]:
    """The pin of a `--model`: `tiny`, a directory or a hub name."""
    return fingerprint(find_checkpoint(name))


def problems_pin(problems: list[Problem]) -> str:
    """SHA-256 of problems in their order, wherever they come from: a file, the hub, the embedded world."""
    return hashlib.sha256(json.dumps([astuple(problem) for problem in problems]).encode()).hexdigest()


def difference(found: object, wanted: object) -> str | None:
    """The first part in which two pins differ, in words; None where they are the same."""
    if found == wanted:
        return None
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return f"{_short(found)}, now {_short(wanted)}"
    key = min(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return f"{key} {_short(found.get(key))}, now {_short(wanted.get(key))}"


def _short(value: object) -> str:
    return "not there" if value is None else str(value)[:12]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_pins(config, problems: list[Problem], held_out: list[Problem]) -> dict:
    """What the inputs of a training run hold, by flag; read once, by the first rank."""
    if rank() > 0:
        return gather_objects(None)[0]
    pins = {"model": model_pin(config.model), "data": problems_pin(problems), "eval_data": problems_pin(held_out)}
    return gather_objects({**pins, "prompts": asdict(load_prompts(config.prompts))})[0]
