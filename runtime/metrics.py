"""What a training step logs, and the warnings about a run that looks wrong. Formulas: docs/metrics.md."""

import time
from collections import defaultdict
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from loss import TokenScores, chunk_rows, log_probabilities
from model import head_logits
from rollout import Response
from runtime.ranks import gather_objects


class Observer:
    """Watches one step: seconds by part, the tokens' statistics by tenth of the solution, problems with a broken loss.

    `table` adds up over micro-batches and, by the trainer's sum, over ranks.
    """

    COLUMNS = ("tokens", "divergence", "weight", "forward_kl", "clipped_mass", "student_entropy", "teacher_entropy",
               "sampler_gap")  # fmt: skip

    def __init__(self, device: torch.device) -> None:
        self.table, self.has_gap = torch.zeros(10, len(self.COLUMNS), device=device), False
        self.broken: list[int] = []
        self.seconds, self._last = defaultdict(float), time.perf_counter()

    def lap(self, part: str) -> None:
        """The seconds since the last call belong to `part`; waits for the GPU."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def see(
        self, numbers: list[int], L: list[int], r_M: Tensor, w_M: Tensor, scores: TokenScores, gap_M: Tensor | None
    ) -> None:
        """A micro-batch of the problems with these row numbers and lengths; `gap_M` is `sampler_gap` of its tokens."""
        self.has_gap = gap_M is not None
        columns = [
            torch.ones_like(w_M), scores.loss.detach(), w_M, scores.forward_kl, scores.clipped_mass,
            scores.student_entropy, scores.teacher_entropy, torch.zeros_like(w_M) if gap_M is None else gap_M,
        ]  # fmt: skip
        self.table.index_add_(0, (r_M * 10).long().clamp(max=9), torch.stack(columns, dim=1).float())
        weighted_M = w_M * scores.loss.detach()
        if not weighted_M.isfinite().all():
            rows = zip(numbers, weighted_M.split(L), strict=True)
            self.broken += [number for number, part_L in rows if not part_L.isfinite().all()]

    def means(self) -> dict:
        """Means over the step's tokens, and by tenth of the solution (null where no token lies)."""
        rows, total = self.table.tolist(), self.table.sum(dim=0).tolist()
        columns = list(enumerate(self.COLUMNS))[1 : None if self.has_gap else -1]
        means = {name: total[i] / total[0] for i, name in columns}
        return {**means, "by_decile": {name: [r[i] / r[0] if r[0] else None for r in rows] for i, name in columns}}

    def times(self, sampled_tokens: int) -> dict:
        """Seconds by part, and this rank's sampled tokens a second."""
        seconds = {f"seconds_{part}": round(value, 4) for part, value in self.seconds.items()}
        return {**seconds, "sampled_tokens_per_second": round(sampled_tokens / self.seconds["sampling"], 1)}


@torch.no_grad()
def sampler_gap(student_MD: Tensor, head_VD: Tensor, ids_M: Tensor, responses: list[Response]) -> Tensor | None:
    """|log q(y_t) - log pi_theta(y_t)| at temperature 1, q the engine's probability of what it has sampled; [M].

    0 but for rounding where the engine samples from the very weights that are trained. None where it does not tell.
    """
    if any(response.logprobs is None for response in responses):
        return None
    sampler_logp_M = torch.tensor([logp for response in responses for logp in response.logprobs], device=ids_M.device)
    size = chunk_rows(head_VD)
    chunks = zip(student_MD.split(size), ids_M.split(size), strict=True)
    logps = [log_probabilities(head_logits(x, head_VD), 1.0).gather(-1, y[:, None]) for x, y in chunks]
    return (sampler_logp_M - torch.cat(logps)[:, 0]).abs()


def rollout_metrics(samples: list[dict], repeating: list[bool]) -> dict:
    """Over all ranks: accuracy where a problem has an answer, mean length, shares that ended and that repeat."""
    graded = [row["correct"] for row in samples if row["correct"] is not None]
    ended = [row["finish_reason"] == "eos" for row in samples]
    counts = [sum(graded), len(graded), sum(row["tokens"] for row in samples), sum(ended), sum(repeating), len(samples)]
    correct, count, tokens, eos, loops, rows = (sum(column) for column in zip(*gather_objects(counts), strict=True))
    shares = {"mean_length": tokens / rows, "eos_rate": eos / rows, "repetition": loops / rows}
    return {"accuracy": correct / count if count else None, **shares}


def repeats(ids: list[int], tail: int = 200, run: int = 20) -> bool:
    """Whether some run of 20 tokens stands twice within the last 200."""
    last = ids[-tail:]
    runs = [tuple(last[start : start + run]) for start in range(len(last) - run + 1)]
    return len(set(runs)) < len(runs)


def step_line(m: dict, num_steps: int) -> str:
    """A step's metrics in 80 columns; docs/metrics.md explains each."""
    accuracy = "-" if m["accuracy"] is None else f"{m['accuracy']:.2f}"  # None: the problems have no answers
    seconds = sum(value for name, value in m.items() if name.startswith("seconds_"))
    return (
        f"{m['step'] + 1:3d}/{num_steps}  loss {m['loss']:.4f}  grad {m['grad_norm']:.3f}  right {accuracy}  "
        f"len {m['mean_length']:.0f}  ended {m['eos_rate']:.2f}  {seconds:.1f} s"
    )


# Measured: docs/servers.md, "Are the rollouts from the weights we think?"
GAP_FLOAT32 = 1e-5
GAP_16_BIT = 5e-2
GAP_GROWTH = 3.0


def gap_warning(history: list[dict], dtype: torch.dtype) -> str | None:
    """One line if the last step's `sampler_gap` is larger than rounding explains, else None.

    In float32 rounding has one size. In 16 bit two engines differ by more, as the first step that tells shows, before
    which the adapter was loaded anew; what grows from there is no rounding.
    """
    gaps = [row["sampler_gap"] for row in history if "sampler_gap" in row]
    if "sampler_gap" not in history[-1]:
        return None
    gap, bound = gaps[-1], GAP_FLOAT32 if dtype == torch.float32 else min(GAP_16_BIT, GAP_GROWTH * gaps[0])
    why = "the engine samples from other weights than those trained (an adapter, checkpoint or precision of its own)"
    return f"sampler_gap {gap:.1e} is above {bound:.1e}: {why}" if gap > bound else None


COLLAPSE_WINDOW = 5  # steps; a single step's accuracy is a mean over few rollouts
# What counts as collapsed, by the mean of the first or the best window and that of the last one.
COLLAPSES = {
    "accuracy": (max, lambda start, now: now <= start / 2 > 0.0),
    "eos_rate": (max, lambda start, now: now <= start / 2 > 0.0),
    "mean_length": (itemgetter(0), lambda start, now: now <= start / 4),  # self-distillation alone may halve it
    "repetition": (itemgetter(0), lambda start, now: now >= start + 0.25),
}


def collapse_warning(history: list[dict], limit: int) -> str | None:
    """One line if the last steps look collapsed (COLLAPSES, or every rollout was cut at `limit` tokens), else None."""
    windows = [history[end - COLLAPSE_WINDOW : end] for end in range(COLLAPSE_WINDOW, len(history) + 1)]
    if windows and all(step["mean_length"] >= limit for step in windows[-1]):
        return f"the run looks collapsed: all rollouts of {COLLAPSE_WINDOW} steps were cut at --max_new_tokens {limit}"
    for name, (start_of, is_bad) in COLLAPSES.items():
        told = [[step.get(name) for step in window] for window in windows]
        means = [None if None in values else sum(values) / COLLAPSE_WINDOW for values in told]  # null: no answers
        known = [mean for mean in means if mean is not None]
        if known and means[-1] is not None and is_bad(start := start_of(known), now := means[-1]):
            return f"the run looks collapsed: {name} went from {start:.2f} to {now:.2f} (over {COLLAPSE_WINDOW} steps)"
    return None


def drift_warning(history: list[dict]) -> str | None:
    """One line if the last steps' `forward_kl` is above 1.5 times that of the first ones that tell it, else None.

    And by more than .001 nats: two contexts that agree differ by rounding.
    """
    told = [row["forward_kl"] for row in history if "forward_kl" in row]
    start, now = (sum(window) / COLLAPSE_WINDOW for window in (told[:COLLAPSE_WINDOW], told[-COLLAPSE_WINDOW:]))
    if now <= max(1.5 * start, start + 1e-3):
        return None
    return f"the student moves away from its teacher: forward_kl went from {start:.2g} to {now:.2g}"


class Watch:
    """What is said of a run that looks wrong: each kind of warning once.

    `earlier`: the metrics of the steps before a resume; a run's start is its first step, not the first after a resume.
    """

    def __init__(self, limit: int, lora_dropout: float, dtype: torch.dtype, earlier: list[dict]) -> None:
        self.history, self.kinds = list(earlier), [partial(collapse_warning, limit=limit), drift_warning]
        if lora_dropout == 0.0:  # with it the trainer's own log-probabilities are of another adapter
            self.kinds.append(partial(gap_warning, dtype=dtype))

    def see(self, metrics: dict) -> list[str]:
        """Warnings that a step's metrics bring, one line each."""
        self.history.append(metrics)
        said = {warning: text for warning in self.kinds if (text := warning(self.history))}
        self.kinds = [warning for warning in self.kinds if warning not in said]
        return [f"warning: after step {metrics['step'] + 1}: {text}" for text in said.values()]
