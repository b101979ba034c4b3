"""The engines on the same work: how much is solved, whose greedy answers differ, tokens a second.

    python -m experiments.engines --server http://localhost:8000 --adapter runs/tiny-pwopsd-seed42/checkpoint-20

The embedded model and an adapter of it on held-out sums; what differs is counted against the first engine's answers.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing

import numpy as np

from evaluate import share_interval, solve
from grading import ExactGrader, extract_boxed
from model import load_model, load_tokenizer
from problems import tiny_problems
from rollout import Sampling
from runtime.adapters import load_adapter
from runtime.engines import Engine, connect, make_engine
from runtime.flags import run_script
from runtime.samples import Sample

DECODINGS = {"sampled": Sampling(1.0, 0.95, 0, 96), "greedy": Sampling(0.0, 1.0, 0, 96)}


def open_engine(name: str, adapter: str | None, server: str | None, rows: int) -> Engine:
    tokenizer = load_tokenizer("tiny")
    if name == "server":
        return connect(server, "tiny", tokenizer, [tokenizer.eos_token_id], rows, adapter)
    model = load_model("tiny", device="cpu").eval()
    if adapter is not None:
        load_adapter(model, adapter)
    return make_engine(name, model, tokenizer, rows)


def row(samples: list[Sample], problems: list, seconds: float, first: list[Sample]) -> str:
    solved = [ExactGrader().match(extract_boxed(s.text), problems[s.problem].answer) for s in samples]
    low, high = share_interval(np.array(solved, dtype=float))
    tokens, other = sum(s.tokens for s in samples), sum(a.text != b.text for a, b in zip(samples, first, strict=True))
    return (
        f"{100 * sum(solved) / len(solved):.1f} [{100 * low:.1f}, {100 * high:.1f}] | {other} | "
        f"{tokens / seconds:.0f} | {tokens} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="address of a vLLM that serves the embedded model as tiny")
    parser.add_argument("--adapter", help="one of the embedded model's, besides the base")
    parser.add_argument("--engines", nargs="+", default=["generate", "continuous", "server"])
    parser.add_argument("--num_problems", type=int, default=400)
    args = parser.parse_args()
    problems, tokenizer = tiny_problems("heldout", args.num_problems), load_tokenizer("tiny")
    jobs, first = [(0, index, 0) for index in range(len(problems))], {}
    names = ("engine", "weights", "decoding", "solved, %", "other answers", "tokens a second", "tokens")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for weights, adapter in {"base": None, "adapter": args.adapter}.items():
        if weights == "adapter" and adapter is None:
            continue
        for name in args.engines:
            with closing(open_engine(name, adapter, args.server, len(problems))) as engine:
                solve(engine, tokenizer, problems, jobs[:16], DECODINGS["greedy"])  # a first call is slower
                for decoding, settings in DECODINGS.items():
                    start = time.perf_counter()
                    samples = solve(engine, tokenizer, problems, jobs, settings)
                    seconds = time.perf_counter() - start
                    first.setdefault((weights, decoding), samples)
                    cells = row(samples, problems, seconds, first[weights, decoding])
                    print(f"| {name} | {weights} | {decoding} | {cells}", flush=True)


if __name__ == "__main__":
    run_script(main)
