"""Watch a run of train.py in trackio, TensorBoard or Weights & Biases: reads what the run writes, beside it.

    python -m experiments.follow runs/RUN --to trackio

Started at any time, it sends the rows of metrics.jsonl from the first one on, with the held-out accuracies, and ends
with the run. Each step is sent once: the same steps that a resumed run makes again are not. Started again, it replaces
what it has sent before. Training does not know of it, waits for nothing and cannot fail with it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from errors import InputError
from runtime.flags import run_script
from runtime.records import read_record, read_rows

PROJECT = "pw-opsd"
SECONDS = 2.0  # between looks at the run


def to_trackio(run: Path, config: dict) -> tuple[Callable, Callable]:
    import trackio

    folder = str(run.resolve())
    with suppress(ValueError):  # there is no such project yet
        for old in trackio.Api().runs(PROJECT):
            if (old.config or {}).get("folder") == folder:
                old.delete()
    trackio.init(PROJECT, run.name, config=config | {"folder": folder}, auto_log_gpu=False, auto_log_cpu=False)
    return trackio.log, trackio.finish


def to_tensorboard(run: Path, config: dict) -> tuple[Callable, Callable]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=0)  # what was sent before is not shown
    return lambda row, step: [writer.add_scalar(name, x, step) for name, x in row.items()], writer.close


def to_wandb(run: Path, config: dict) -> tuple[Callable, Callable]:
    import wandb

    number = sha256(str(run.resolve()).encode()).hexdigest()[:16]  # a run that is known drops steps that it has
    wandb.init(project=PROJECT, name=run.name, id=number, resume="allow", config=config, dir=run)
    return wandb.log, wandb.finish


TRACKERS = {"trackio": to_trackio, "tensorboard": to_tensorboard, "wandb": to_wandb}


def numbers(run: Path, num_steps: int) -> dict[int, dict[str, float]]:
    """By steps done: that row's numbers, and the held-out accuracies at that time; at last those of the run's end."""
    rows = {row.pop("step"): row for row in read_rows(run / "metrics.jsonl", ("step",))}
    scored = run / "evaluation.json"
    for step, accuracies in (json.loads(scored.read_text()) if scored.exists() else {}).items():
        if int(step) in {*rows, num_steps}:  # a step's own row is written after them
            rows.setdefault(int(step), {}).update({f"heldout_{name}": value for name, value in accuracies.items()})
    return {step: {name: x for name, x in row.items() if isinstance(x, (int, float))} for step, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--to", choices=TRACKERS, required=True)
    args = parser.parse_args()
    record = read_record(args.run)
    if record is None or record["script"] != "train":
        raise InputError(f"{args.run}: no run folder of train.py")
    config, last = record["config"], -1
    try:
        log, finish = TRACKERS[args.to](args.run, config)
    except ImportError:
        raise InputError(f"--to {args.to} needs `pip install {args.to}`") from None
    while True:
        for step, row in sorted(numbers(args.run, config["num_steps"]).items()):
            if step > last:
                log(row, step=step)
                last = step
        if last >= config["num_steps"] - (not config["eval_data"]):
            return finish()
        time.sleep(SECONDS)


if __name__ == "__main__":
    run_script(main)
