"""Watch a run of train.py in trackio, TensorBoard or Weights & Biases: reads what the run writes, beside it.

    python -m experiments.follow runs/RUN --to trackio

Started at any time, it sends the rows of metrics.jsonl from the first one on, with the held-out accuracies, and ends
with the run's last step; where a run stops earlier it waits for more, until Ctrl-C. Each step is sent once. Started
again, it sends all as another run there. Training does not know of it.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from errors import InputError
from runtime.flags import run_script
from runtime.records import read_record, read_rows

SECONDS = 2.0  # between looks at the run


def tracker(name: str, run: Path, config: dict) -> tuple[Callable, Callable]:
    """What takes a row, (row, step=), and what ends it; trackio has the functions of wandb."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"), purge_step=0)  # what was sent before is not shown
        return lambda row, step: [writer.add_scalar(name, x, step) for name, x in row.items()], writer.close
    module = import_module(name)
    module.init(project="pw-opsd", name=f"{run.name} {time.strftime('%m-%d %H:%M:%S')}", config=config)
    return module.log, module.finish


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
    parser.add_argument("--to", choices=("trackio", "tensorboard", "wandb"), required=True)
    args = parser.parse_args()
    record = read_record(args.run)
    if record is None or record["script"] != "train":
        raise InputError(f"{args.run}: no run folder of train.py")
    config, last = record["config"], -1
    try:
        log, finish = tracker(args.to, args.run, config)
    except ImportError:
        raise InputError(f"--to {args.to} needs `pip install {args.to}`") from None
    try:
        while True:
            for step, row in sorted(numbers(args.run, config["num_steps"]).items()):
                if step > last:
                    log(row, step=step)
                    last = step
            if last >= config["num_steps"] - (not config["eval_data"]):
                return
            time.sleep(SECONDS)
    finally:
        finish()


if __name__ == "__main__":
    run_script(main)
