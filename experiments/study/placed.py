"""Predicted before training: worlds in which the answer is not built in (`placed`, worlds.py).

    python -m experiments.study.placed predict     a line of predictions.jsonl for each base model in runs/worlds
    python -m experiments.study.placed tune        each arm at three learning rates, on the validation sums
    python -m experiments.study.placed measure     each at its best rate, four seeds, four samples of the final sums
    python -m experiments.study.placed early       the same at one rate, at which learning is not done
    python -m experiments.study.placed report

Each adds what is missing to runs/study-placed and may be killed. Cells carry the digest of predictions.jsonl, to which
lines are only added: the report refuses a cell that ran before its world was predicted.
Axes: N solutions, M their tokens, V vocabulary, C positions, R bootstrap resamples.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import diagnose
from errors import InputError
from experiments.draw_run import figure
from experiments.study.grids import ROWS, Grid
from experiments.study.report import LEVEL, Difference, markdown, paired_difference, scipy_stats
from experiments.study.run import cores, model_id, processor, read_cells, run_grid
from grading import answers_match, extract_boxed
from loss import LossOptions, log_probabilities, resolve_method
from model import head_logits, response_hidden, response_mask
from problems import load_problems
from rollout import Sampling, until_eos
from runtime.engines import GenerateEngine
from runtime.flags import run_script
from runtime.loading import load_model, load_tokenizer
from runtime.records import append_rows, git_commit, make_folder, read_rows
from teacher import student_prompt, teacher_prompt
from viability import POSITION, LabelRule, auroc_of, interval, resamples, to_columns
from weighting import relative_position

SOLUTIONS, POSITIONS, CONTINUATIONS, RESAMPLES, MAX_TOKENS = 1000, 4000, 1, 2000, 128
DIAGNOSED = 200  # problems of the paper's diagnostic, for the rivals
ROLLOUT, EVALUATION = Sampling(1.1, 0.95, 0, MAX_TOKENS), Sampling(1.0, 0.95, 0, MAX_TOKENS)  # as train.py samples
ARMS = {
    "uniform": ROWS["uniform, per sequence"], "Moderate": ROWS["PW-OPSD Moderate"], "OPSD": ROWS["OPSD"],
    "reversed": ROWS["reversed Moderate"], "Aggressive": ROWS["Aggressive"], "by index": {"method": "by_index"},
}  # fmt: skip
RISE = {"Moderate": 1, "reversed": -1, "Aggressive": 1, "by index": 1}  # arms predicted against uniform
FOUR = ("uniform", "Moderate", "reversed", "Aggressive")  # measured at a fixed rate too
CLIPPED = ", clip .05"  # and under the paper's clip, in the two extreme windows
ARMS |= {arm + CLIPPED: ARMS[arm] | {"tau_clip": 0.05} for arm in FOUR}
EXTREME = ("placed-12-", "placed-56-")
SIDES = {1: "up", 0: "none", -1: "down"}
RATES, STEPS, TUNING_SEEDS, SEEDS = (1e-4, 3e-4, 1e-3), 20, [4], [0, 1, 2, 3]
EARLY = 3e-4  # picked for `early` after one seed at each rate was seen: its four seeds are others
PARTS = {"final": "At tuned rates", "early": f"At {EARLY:g} everywhere"}
EQUIVALENT = 2.0  # points
WINDOW = r"placed-\d\d-"  # the worlds with a window; its first step is the name's eighth letter

# --- The prediction: the teacher's harm by position, sampled from the model before any training -----------------


def predict(world: Path) -> dict:
    """A world's line of predictions.jsonl. `harm`: H(arm) - H(uniform), a share of right answers; its 95 % interval.

    The student's solutions, right and wrong ones, as in training. Where both contexts draw the same token there is
    nothing to compare: positions are drawn by m_t / L, m_t = 1/2 sum_j |p_T(j) - p_S(j)|, and children from what each
    context has more of. D = viability of the student's child - that of the teacher's, each continued by the student.
    H = mean over solutions of 1/L sum_t m_t D_t w_t / mean(w): AdamW does not see a constant factor.
    """
    model, tokenizer = load_model(str(world / "model"), device="cpu"), load_tokenizer(str(world / "model"))
    problems, engine = load_problems(str(world / "train.jsonl"))[:SOLUTIONS], GenerateEngine(model, tokenizer, 400)
    x_stu, x_tch = ([make(tokenizer, problem) for problem in problems] for make in (student_prompt, teacher_prompt))
    y = [response.ids for response in engine.sample(x_stu, [(0, n) for n in range(len(x_stu))], ROLLOUT)]
    L, mask_NT, head_VD = [len(ids) for ids in y], response_mask([len(ids) for ids in y]), model.lm_head.weight
    with torch.no_grad():
        hidden = (response_hidden(model, x, y)[mask_NT] for x in (x_tch, x_stu))
        teacher_MV, student_MV = (log_probabilities(head_logits(h_MD, head_VD), 1.0).exp() for h_MD in hidden)
    gap_MV, (n_M, t_M) = teacher_MV - student_MV, mask_NT.nonzero().T
    share_M = 1.0 / (torch.tensor(L)[n_M] * len(L))  # of a token in a mean over solutions
    mass_M, draw = share_M * gap_MV.clamp(min=0.0).sum(dim=-1), torch.Generator().manual_seed(0)
    at_C = torch.multinomial(mass_M, POSITIONS, replacement=True, generator=draw)

    def viability(more_CV: Tensor) -> np.ndarray:
        """Of a child drawn at each position, by the same random numbers for both contexts; [C]."""
        places = zip(n_M[at_C].tolist(), t_M[at_C].tolist(), torch.multinomial(more_CV, 1, generator=draw), strict=True)
        jobs = [(n, [*y[n][:t], child.item()]) for n, t, child in places for _ in range(CONTINUATIONS)]
        starts, keys = [x_stu[n] + ids for n, ids in jobs], [(1, i) for i in range(len(jobs))]
        right = []
        for (n, ids), more in zip(jobs, engine.sample(starts, keys, EVALUATION), strict=True):
            whole = until_eos(ids + more.ids, [tokenizer.eos_token_id]).ids
            right.append(answers_match(extract_boxed(tokenizer.decode(whole)), problems[n].answer))
        return np.reshape(right, (POSITIONS, CONTINUATIONS)).mean(axis=1)

    D_C, r_M = viability((-gap_MV[at_C]).clamp(min=0.0)) - viability(gap_MV[at_C].clamp(min=0.0)), relative_position(L)
    harm_C, counts_RC = mass_M.sum().item() * D_C, resamples(len(L), RESAMPLES, 0)[:, n_M[at_C]]
    harm = {}
    for arm in RISE:
        method = resolve_method(ARMS[arm]["method"], LossOptions(schedule=ARMS[arm].get("schedule")))
        w_M = method.token_weight(r_M, None, L, 0, None)
        gap_C = ((w_M / (share_M * w_M).sum())[at_C].numpy() - 1.0) * harm_C
        harm[arm] = [float(gap_C.mean()), *interval((counts_RC @ gap_C) / counts_RC.sum(axis=1))]
    tenths = np.bincount((10 * r_M[at_C]).int(), harm_C / POSITIONS, minlength=10).tolist()
    return {"world": world.name, "model_id": model_id(str(world / "model")), "harm": harm, "harm_by_tenth": tenths}


def position_auroc(world: Path) -> dict[str, float]:
    """Table 1's AUROC of 1 - r by the paper's diagnostic, and the same of continuations in which nothing is forced."""
    folder = world / "diagnose"
    flags = {"preset": "tiny", "model": world / "model", "data": world / "train.jsonl", "num_problems": DIAGNOSED,
             "context": 190, "spine_tokens": 110, "output_dir": folder, "resume": "true"}  # fmt: skip
    with mock.patch.object(sys, "argv", ["diagnose.py", *(f"--{name}={value}" for name, value in flags.items())]):
        diagnose.main()
    data = to_columns(read_rows(folder / "F_labels.jsonl"), LabelRule(children=2))
    found = {name: auroc_of(data, data.score[POSITION], name) for name in ("teacher", "unforced")}
    return {name: row[0]["auroc"] if row else 0.5 for name, row in found.items()}


def with_claims(line: dict, auroc: dict[str, float]) -> dict:
    """The line with what each predictor says of each arm: ours, and its rivals, who know rising from falling only."""
    ours = {arm: SIDES[-int(np.sign(low)) if low * high > 0 else 0] for arm, (_, low, high) in line["harm"].items()}
    rivals = {"always up": 1, "AUROC above .5": np.sign(auroc["teacher"] - 0.5),
              "AUROC above its null": np.sign(auroc["teacher"] - auroc["unforced"]), "none": 0}  # fmt: skip
    claims = {name: {arm: SIDES[int(sign * RISE[arm])] for arm in RISE} for name, sign in rivals.items()}
    return line | {"auroc": auroc, "claims": {"harm": ours} | claims, "processor": processor(), "commit": git_commit()}


# --- The cells --------------------------------------------------------------------------------------------------


def grid(output: Path, rates: dict[tuple[str, str], Iterable[float]], seeds: list[int], split: str) -> Grid:
    """A row for each world, arm and learning rate."""
    rows = {}
    for (world, arm), of_arm in rates.items():
        folder = f"runs/worlds/{world}"
        data = {"model": f"{folder}/model", "data": f"{folder}/train.jsonl", "eval_data": f"{folder}/{split}.jsonl"}
        rows |= {f"{world} / {arm} / {rate:g}": {**data, **ARMS[arm], "learning_rate": rate} for rate in of_arm}
    if not rows:
        raise InputError(f"{output}: no world there is predicted, or for `measure` tuned")
    digest = hashlib.sha256((output / "predictions.jsonl").read_bytes()).hexdigest()
    common = {"preset": "tiny", "max_new_tokens": MAX_TOKENS, "num_steps": STEPS}
    return Grid(common, seeds, rows, baseline=next(iter(rows)), facts={"predictions": digest})


def tuned_arms(output: Path) -> list[tuple[str, str]]:
    """(world, arm) of all that is tuned, arm by arm; OPSD takes uniform's rate."""
    worlds = [line["world"] for line in read_predictions(output)]
    arms = [arm for arm in ARMS if arm != "OPSD"]
    return [(world, arm) for arm in arms for world in worlds if CLIPPED not in arm or world.startswith(EXTREME)]


def tuning(output: Path) -> Grid:
    return grid(output, dict.fromkeys(tuned_arms(output), RATES), TUNING_SEEDS, "validation")


def final(output: Path) -> Grid:
    """Each arm at its best rate; one of which a tuning cell is missing waits."""
    tuned = {key: mean(by_seed.values()) for key, by_seed in scores(output, "tuning").items()}
    best = {}
    for world, arm in tuned_arms(output):
        if all((world, arm, rate) in tuned for rate in RATES):
            best[world, arm] = [max(RATES, key=lambda rate: tuned[world, arm, rate])]
            if arm == "uniform":
                best[world, "OPSD"] = best[world, arm]
    return grid(output, best, SEEDS, "final")


def early(output: Path) -> Grid:
    arms = [key for key in tuned_arms(output) if key[1] in FOUR]
    return grid(output, dict.fromkeys(arms, (EARLY,)), SEEDS, "final")


def read_predictions(output: Path) -> list[dict]:
    return read_rows(output / "predictions.jsonl", ("world", "model_id", "harm", "claims"))


def scores(output: Path, part: str) -> dict[tuple[str, str, float], dict[int, float]]:
    """(world, arm, rate) -> seed -> sampled accuracy after training, %.

    Raises InputError for a cell of a model that had no line in predictions.jsonl when it ran.
    """
    lines = (output / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    models = [row["model_id"] for row in read_predictions(output)]
    known = {hashlib.sha256(b"".join(lines[:n])).hexdigest(): models[:n] for n in range(1, len(lines) + 1)}
    found: dict[tuple[str, str, float], dict[int, float]] = {}
    for cell in read_cells(output / part / "cells.jsonl"):
        world, arm, rate = cell["row"].split(" / ")
        if cell["model_id"] not in known.get(cell["predictions"], ()):
            raise InputError(f"{output / part}: a cell of {world} that no line of predictions.jsonl came before")
        if cell["error"] is None:
            accuracy = 100 * cell["evaluation"][str(STEPS)]["sampled"]
            found.setdefault((world, arm, float(rate)), {})[cell["seed"]] = accuracy
    return found


# --- The report -------------------------------------------------------------------------------------------------


def write_report(output: Path) -> str:
    """OUTPUT/report.md and, with matplotlib, scatter.png from the cells measured so far."""
    lines = read_predictions(output)
    by_part = {part: {key[:2]: by_seed for key, by_seed in scores(output, part).items()} for part in PARTS}
    found = {
        part: {key: d for key in ((line["world"], arm) for line in lines for arm in RISE)
               if (d := minus(by_arm, *key, "uniform"))} for part, by_arm in by_part.items()
    }  # fmt: skip
    intro = (
        f"# Predicted before training\n\n{len(lines)} of 16 base models predicted. Each row: what was predicted; what "
        "was measured, in points of sampled accuracy against uniform weights per sequence [95 % over "
        f"{len(SEEDS)} seeds]; a hit where the interval lies on the predicted side of 0, or for none, around it."
    )
    sections = [text for part in PARTS for text in section(lines, part, found[part], by_part[part])]
    text = "\n\n".join([intro, *sections, *clipped(lines, by_part["final"])]) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    if any(found.values()):
        scatter(lines, found).savefig(output / "scatter.png")
    return text


def section(lines: list[dict], part: str, found: dict[tuple[str, str], Difference], by_arm: dict) -> list[str]:
    """One measurement: a row for each base model, the hits of each predictor, and what holds over base models."""
    arms = [arm for arm in RISE if any(measured == arm for _, measured in found)] or [*RISE]
    beside = [("Moderate", "reversed"), *[("OPSD", "uniform")] * any(arm == "OPSD" for _, arm in by_arm)]
    body, hits = [], {name: [] for name in lines[0]["claims"]}
    for line in lines:
        body.append([line["world"]])
        for arm in arms:
            claim, d = line["claims"]["harm"][arm], found.get((line["world"], arm))
            measured = d and SIDES[int(np.sign(d.mean)) if d.p < LEVEL else 0]
            body[-1].append(f"{claim}; {d or '-'}" + (", hit" if measured == claim else ""))
            for name, hit in hits.items():
                hit += [measured == line["claims"][name][arm]] if d else []
        body[-1] += [minus(by_arm, line["world"], *pair) or "-" for pair in beside]
    return [
        f"## {PARTS[part]}: {len(found)} of {len(lines) * len(arms)} differences measured",
        markdown(["base model", *arms, *map(" - ".join, beside)], body),
        markdown(["predictor", "hits"], [[name, f"{sum(hit)} of {len(hit)}"] for name, hit in hits.items()]),
        *across(lines, found, by_arm),
    ]


def minus(by_arm: dict, world: str, left: str, right: str) -> Difference | None:
    """None before all seeds of both are there."""
    found = paired_difference(by_arm.get((world, left), {}), by_arm.get((world, right), {}))
    return found if found and found.pairs == len(SEEDS) else None


def across(lines: list[dict], found: dict[tuple[str, str], Difference], by_arm: dict) -> list[str]:
    """Over base models: harm against what was measured, the window's centre, and the worlds without a window."""
    harm, flat = [], []
    for arm in RISE:
        of = [(line, found[line["world"], arm].mean) for line in lines if (line["world"], arm) in found]
        if not of:
            continue
        harm.append([arm, len(of), rank_correlation([(100 * line["harm"][arm][0], value) for line, value in of])])
        values = [value for line, value in of if line["world"].split("-")[1] in ("123456", "random")]
        if len(values) > 1:
            low, high = scipy_stats().ttest_1samp(values, 0.0).confidence_interval(0.90)
            said = "yes" if max(-low, high) < EQUIVALENT else "not shown"
            flat.append([arm, len(values), f"{mean(values):+.1f} [{low:+.1f}, {high:+.1f}]", said])
    worlds = [line["world"] for line in lines if re.match(WINDOW, line["world"])]
    windows = [(int(w[7]), d.mean) for w in worlds if (d := minus(by_arm, w, "Moderate", "reversed"))]
    return [
        "Rank correlation over base models of the predicted harm with the measured difference [95 %, resampled].",
        markdown(["arm", "base models", "Spearman"], harm),
        f"Moderate - reversed against the window's place: Spearman {rank_correlation(windows)}.",
        "Worlds `123456` and `random`, mean over base models [90 %]: two one-sided tests at 5 %.",
        markdown(["arm", "base models", "mean", f"within {EQUIVALENT:g} points"], flat),
    ]


def clipped(lines: list[dict], by_arm: dict) -> list[str]:
    """The arms under the paper's clip, each against uniform under it, and that clip alone against none."""
    worlds = [line["world"] for line in lines if line["world"].startswith(EXTREME)]
    pairs = [("uniform" + CLIPPED, "uniform"), *((arm + CLIPPED, "uniform" + CLIPPED) for arm in RISE)]
    pairs = [(left, right) for left, right in pairs if left in ARMS]
    body = [[world, *(minus(by_arm, world, *pair) or "-" for pair in pairs)] for world in worlds]
    head = f"## Under the paper's clip, {', '.join(EXTREME)[:-1]}: at tuned rates"
    return [head, markdown(["base model", *map(" - ".join, pairs)], body)] if body else []


def scatter(lines: list[dict], found: dict[str, dict[tuple[str, str], Difference]]):
    """What each base model's harm predicts of an arm, against what was measured; both with their 95 % intervals."""
    drawn, axes = figure(12, 5, [[*PARTS]])
    for part, by_line in found.items():
        for arm in RISE:
            of = [(line["harm"][arm], by_line[line["world"], arm]) for line in lines if (line["world"], arm) in by_line]
            if of:
                harm, low, high = 100 * np.array([h for h, _ in of]).T
                y, *limits = np.array([[d.mean, d.low, d.high] for _, d in of]).T
                bars = {"xerr": (harm - low, high - harm), "yerr": (y - limits[0], limits[1] - y)}
                axes[part].errorbar(harm, y, **bars, fmt="o", elinewidth=0.6, markersize=4, label=arm)
        axes[part].set(title=PARTS[part], xlabel="harm before training - uniform (points of right answers a token)",
                       ylabel="sampled accuracy after training - uniform (points)")  # fmt: skip
        axes[part].axhline(0.0, color="0.5", linewidth=0.8)
        axes[part].axvline(0.0, color="0.5", linewidth=0.8)
        if by_line:
            axes[part].legend(fontsize=8, frameon=False)
    return drawn


def rank_correlation(pairs: list[tuple[float, float]]) -> str:
    """Spearman's with the percentile interval of resampled base models; - for fewer than four, or equal ones."""
    if len(pairs) < 4 or not np.ptp(pairs, axis=0).all():
        return "-"
    xy, draw, rho = np.array(pairs), np.random.default_rng(0), scipy_stats().spearmanr
    drawn = (xy[draw.integers(len(xy), size=len(xy))] for _ in range(RESAMPLES))
    values = [rho(*again.T).statistic for again in drawn if np.ptp(again, axis=0).all()]
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(rho(*xy.T).statistic, *interval(np.array(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("predict", "tune", "measure", "early", "report"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study-placed"))
    parser.add_argument("--workers", type=int, default=cores(), help="cells at a time")
    args = parser.parse_args()
    output = make_folder(args.output_dir)
    done = {line["world"] for line in read_predictions(output)}
    if args.action == "predict":
        for world in sorted(Path("runs/worlds").glob("placed-*")):
            if world.name not in done and (world / "model" / "tokenizer.json").is_file():  # written last
                append_rows(output / "predictions.jsonl", [with_claims(predict(world), position_auroc(world))])
    elif not done:
        raise InputError(f"--output_dir {output}: no predictions.jsonl there; make_world, then `predict`")
    elif args.action == "report":
        print(write_report(output))
    else:
        make = {"tune": tuning, "measure": final, "early": early}[args.action]
        run_grid(make(output), output / make.__name__, args.workers)


if __name__ == "__main__":
    run_script(main)
