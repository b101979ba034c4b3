"""What a training step logs, and the warning about a run that looks collapsed. Formulas: docs/metrics.md."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from loss import CHUNK_BYTES, TokenScores, log_probabilities
from rollout import Response
from runtime.ranks import gather_objects


class TokenMetrics:
    """Sums of token statistics by tenth of the solution, over a step's micro-batches; `table` adds up over ranks."""

    NAMES = ("tokens", "divergence", "weight", "clipped_mass", "student_entropy", "teacher_entropy", "sampler_gap")

    def __init__(self, device: torch.device) -> None:
        self.table, self.has_gap = torch.zeros(10, len(self.NAMES), device=device), False

    def add(self, r_M: Tensor, weight_M: Tensor, scores: TokenScores, gap_M: Tensor | None = None) -> None:
        """`gap_M`: `sampler_gap` of the tokens, where the engine tells log-probabilities."""
        self.has_gap = gap_M is not None
        columns = torch.stack(
            [
                torch.ones_like(weight_M), scores.loss.detach(), weight_M, scores.clipped_mass,
                scores.student_entropy, scores.teacher_entropy, torch.zeros_like(weight_M) if gap_M is None else gap_M,
            ],
            dim=1,
        )  # fmt: skip
        self.table.index_add_(0, (r_M.to(self.table.device) * 10).long().clamp(max=9), columns)

    def means(self) -> dict:
        """Means over the step's tokens, and by tenth of the solution (null where no token lies)."""
        rows, total = self.table.tolist(), self.table.sum(dim=0).tolist()
        columns = list(enumerate(self.NAMES))[1 : None if self.has_gap else -1]
        means = {name: total[i] / total[0] for i, name in columns}
        return {**means, "by_decile": {name: [r[i] / r[0] if r[0] else None for r in rows] for i, name in columns}}


@torch.no_grad()
def sampler_gap(student_MD: Tensor, head_VD: Tensor, ids_M: Tensor, responses: list[Response]) -> Tensor | None:
    """|log q(y_t) - log pi_theta(y_t)| at temperature 1, q the engine's probability of what it has sampled; [M].

    0 but for rounding where the engine samples from the very weights that are trained. None where it does not tell.
    """
    if any(response.logprobs is None for response in responses):
        return None
    sampler_logp_M = torch.tensor([logp for response in responses for logp in response.logprobs], device=ids_M.device)
    size = max(1, CHUNK_BYTES // (4 * head_VD.shape[0]))
    chunks = zip(student_MD.split(size), ids_M.split(size), strict=True)
    logp_M = torch.cat([log_probabilities(F.linear(x, head_VD), 1.0).gather(-1, y[:, None])[:, 0] for x, y in chunks])
    return (sampler_logp_M - logp_M).abs()


def rollout_metrics(samples: list[dict]) -> dict:
    """Over all ranks: accuracy on the problems that have an answer, mean length, share that ended with EOS."""
    graded = [row["correct"] for row in samples if row["correct"] is not None]
    ended = [row["finish_reason"] == "eos" for row in samples]
    counts = [sum(graded), len(graded), sum(row["tokens"] for row in samples), sum(ended), len(samples)]
    correct, count, tokens, eos, rows = (sum(column) for column in zip(*gather_objects(counts), strict=True))
    return {"accuracy": correct / count if count else None, "mean_length": tokens / rows, "eos_rate": eos / rows}


def gap_warning(metrics: dict, dtype: torch.dtype) -> str | None:
    """One line if the engine's log-probabilities are further from the trainer's than rounding explains."""
    gap, bound = metrics.get("sampler_gap"), GAP_BOUND_FLOAT32 if dtype == torch.float32 else GAP_BOUND_16_BIT
    if gap is None or gap <= bound:
        return None
    return (
        f"sampler_gap {gap:.1e} is above {bound:.0e}: the engine samples from other weights than those trained "
        "(an adapter that is out of date, another checkpoint or precision on the server)"
    )


GAP_BOUND_FLOAT32 = 1e-4
GAP_BOUND_16_BIT = 5e-2


COLLAPSE_WINDOW = 5  # steps; a single step's accuracy is a mean over few rollouts


def collapse_warning(history: list[dict], limit: int) -> str | None:
    """One line if, over the last steps, every rollout was cut at `limit` tokens or a rate fell to half its best."""
    ends = range(COLLAPSE_WINDOW, len(history) + 1)
    windows = [history[end - COLLAPSE_WINDOW : end] for end in ends]
    if windows and all(step["mean_length"] >= limit for step in windows[-1]):
        return f"every rollout of the last {COLLAPSE_WINDOW} steps was cut at --max_new_tokens {limit}"
    for name in ("accuracy", "eos_rate"):
        means = [sum(step[name] or 0.0 for step in window) / COLLAPSE_WINDOW for window in windows]
        if means and means[-1] <= max(means) / 2 > 0.0:
            return f"{name} fell from {max(means):.2f} to {means[-1]:.2f} (means over {COLLAPSE_WINDOW} steps)"
    return None


class Clock:
    """Seconds spent in the named parts of a step; waits for the GPU at both ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - start

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def metrics(self, samples: list[dict]) -> dict:
        """Seconds by part, and this rank's sampled tokens a second."""
        seconds = {f"seconds_{part}": round(value, 4) for part, value in self.seconds.items()}
        rate = sum(row["tokens"] for row in samples) / self.seconds["sampling"]
        return {**seconds, "sampled_tokens_per_second": round(rate, 1)}


def step_line(metrics: dict, num_steps: int) -> str:
    m = metrics
    accuracy = "-" if m["accuracy"] is None else f"{m['accuracy']:.2f}"  # None: the problems have no answers
    return (
        f"step {m['step'] + 1:3d}/{num_steps}  loss {m['loss']:7.4f}  grad {m['grad_norm']:6.3f}  "
        f"lr {m['learning_rate']:.1e}  accuracy {accuracy}  length {m['mean_length']:5.1f}  "
        f"eos {m['eos_rate']:.2f}  entropy {m['student_entropy']:.3f}/{m['teacher_entropy']:.3f}  "
        f"weight {m['weight']:.3f}  clipped {m['clipped_mass']:.3f}  "
        f"s {m['seconds_sampling']:.2f}+{m['seconds_teacher']:.2f}+{m['seconds_student'] + m['seconds_update']:.2f}"
    )
