"""What does `sampler_gap` show where a server samples from an adapter that is behind? The measure of its warning.

    python -m experiments.sampler_gap --server http://localhost:8000 --learning_rate 2e-3 --dtype float32

Trains through the server as train.py does. At every step the same prompts are also sampled by the adapters of some
steps before, and what the server says of the tokens is compared with the weights that are trained.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from pathlib import Path

import torch

from grading import make_grader
from model import response_hidden, response_mask
from problems import load_problems
from runtime.adapters import save_adapter
from runtime.flags import run_script
from runtime.metrics import sampler_gap
from teacher import student_prompt
from train import TrainConfig, Training, build, parse_config, settle, step_share, train_step

BEHIND = (1, 5)  # steps


@torch.no_grad()
def mean_gap(run: Training, prompts: list[list[int]], keys: list, config: TrainConfig) -> float:
    """Sample from what the server has loaded; the mean of `sampler_gap` over the tokens."""
    y = run.engine.sample(prompts, keys, config.sampling)
    hidden_BTD = response_hidden(run.model, prompts, [response.ids for response in y])
    mask_BT = response_mask([len(response.ids) for response in y])
    ids_M = torch.tensor([token for response in y for token in response.ids])
    head_VD = run.model.get_output_embeddings().weight
    return sampler_gap(hidden_BTD[mask_BT], head_VD, ids_M, y).mean().item()


def measure(config: TrainConfig, folder: Path) -> list[list[float | None]]:
    """A row a step: the gap with the right adapter, then by steps behind; None where there is no such step yet."""
    device = torch.device(config.device)
    problems, rows = load_problems(config.data), []
    run = build(config, device, make_grader("exact", []))
    with closing(run.engine), closing(run.grader):
        for step in range(config.num_steps):
            save_adapter(run.model, folder / str(step), config.model)
            share = step_share(step, problems, config)
            prompts, gaps = [student_prompt(run.tokenizer, problem, run.prompts) for problem in share.problems], []
            for behind in BEHIND:
                if behind <= step:
                    run.engine.use_adapter(folder / str(step - behind), f"gap-{step - behind}")
                gaps.append(mean_gap(run, prompts, share.keys, config) if behind <= step else None)
            run.engine.use_adapter(folder / str(step), f"gap-{step}")
            metrics, _ = train_step(step, run, problems, config)
            rows.append([metrics["sampler_gap"], *gaps])
            print(step, *("-" if gap is None else f"{gap:.1e}" for gap in rows[-1]), flush=True)
    return rows


def table(rows: list[list[float | None]]) -> str:
    """Markdown: for each adapter the least, the mean and the largest of the steps' gaps."""
    names = ["the right one", *(f"{behind} behind" for behind in BEHIND)]
    lines = ["| adapter | least | mean | largest |", "|---|---|---|---|"]
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        gaps = [gap for gap in column if gap is not None]
        lines.append(f"| {name} | {min(gaps):.1e} | {sum(gaps) / len(gaps):.1e} | {max(gaps):.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--learning_rate", default="2e-3")
    parser.add_argument("--dtype", default="float32", help="of the trainer; the server has its own --dtype")
    parser.add_argument("--num_steps", default="20")
    parser.add_argument("--batch_size", default="8")
    args = parser.parse_args()
    words = [f"--{name}={value}" for name, value in vars(args).items()]
    config = parse_config(["--preset", "tiny", "--device", "cpu", *words])
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(settle(config, torch.device("cpu"), None), Path(folder))))


if __name__ == "__main__":
    run_script(main)
