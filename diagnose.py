"""The branch-viability diagnostic (paper Section 3.2, Appendices A and B): where can the teacher's tokens be trusted?

    python diagnose.py                                            the embedded model, a few minutes on two cores
    torchrun --nproc_per_node 4 diagnose.py --preset qwen3-4b     the paper's protocol, shared over GPUs

At uncertain positions of a student's right solution, the teacher's top tokens are forced one by one and the student
goes on alone: does it still get there? Phases A to E each leave a JSONL file in the run folder and take up what they
find there, so --resume goes on after an interruption; F and G (viability.py) make labels and Table 1 of them.

Beyond the paper, the same positions also get the student's own top tokens, and nothing at all (the student simply goes
on), with equal budgets: what a prefix has already cost is not the teacher's fault (experiments/diagnose_report.py).

Axes: T response tokens, V vocabulary, K children of a candidate, N rollouts of a child, M dropout passes, C candidates.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chat import eos_ids
from errors import InputError
from grading import ExactGrader, extract_boxed, make_grader
from model import response_hidden
from problems import Problem, load_problems
from rollout import Sampling
from runtime import records
from runtime.engines import Engine, GenerateEngine, connect
from runtime.flags import FlagParser, departures, option, run_script
from runtime.loading import check_room, context_length, load_model, load_tokenizer
from runtime.ranks import gather_objects, rank, say, start_ranks, stop_ranks
from runtime.records import RowFile, do_jobs
from teacher import PAPER_PROMPTS, Prompts, check_prompts, encode_prompt, load_prompts
from viability import LabelRule, labels, table1, table1_lines, to_columns, truncated_entropy, uncertainty

# Streams of random numbers, told apart by the second entry of their key (rollout.py); train.py uses 1 to 4.
PICK_STREAM, SPINE_STREAM, DROPOUT_STREAM, CONTINUATION_STREAM = 11, 12, 13, 14
SPINES, CANDIDATES, ROLLOUTS = "spines (phase A)", "candidates (phase C)", "continuations (phase E) and sampling"
# The protocol's constants (Appendices A, B); docs/diagnostic.md names those that the paper leaves open.
TOP_P, TEMPERATURE = 0.95, 1.0  # of the continuations; the nucleus is also that of phase A
FALLBACK_TEMPERATURE = 0.7  # A: where the greedy spine has no box
TOP_VALID = 16  # B: the teacher's most likely valid tokens, of which h_trunc is the entropy
MIN_P2, MIN_RATIO = 0.02, 0.10  # C: least teacher probability of the second token, and least p2 / p1
POSITIONS_AT_ONCE = 256  # B: bounds the memory of [T, V] probabilities
PASSES, DROPOUT, DROPPED_LAYERS = 5, 0.1, 4  # D: M, p, and the last layers, whose outputs are dropped out


@dataclass(frozen=True)
class DiagnoseConfig:
    """Options of diagnose.py. Defaults are the paper's (Appendices A, B); a preset changes what it names."""

    preset: str | None = option(None, "tiny (the default without --model) or qwen3-4b", "data")
    model: str = option("tiny", "directory or hub name; `tiny` is the embedded model", "data")
    data: list[str] = option(["tiny:heldout"], "one or more sources: file, folder, hub name, tiny:heldout", "data")
    columns: str | None = option(None, "unusual columns: problem=...,solution=...,answer=...", "data")
    num_problems: list[int] = option([84], "problems drawn from each source, without replacement", "data")
    prompts: str | None = option(None, "JSON file of templates: student, diagnostic", "data")
    context: int = option(32768, "tokens of prompt, prefix and continuation together", "data", least=2)
    student_thinking: bool = option(True, "the student's prompts think; the paper's numbers say so", SPINES)
    spine_tokens: int = option(16384, "length limit of a spine", SPINES, least=1)
    candidates: int = option(5, "C: at most this many per problem", CANDIDATES, least=1)
    min_spacing: int = option(64, "C: least distance of two candidates, in tokens", CANDIDATES, least=1)
    children: int = option(3, "K, tokens forced at a candidate", ROLLOUTS, within=(2, TOP_VALID))
    rollouts: int = option(6, "continuations of each child", ROLLOUTS, least=1)
    server: str | None = option(None, "address of a vLLM that serves --model", ROLLOUTS)
    batch_size: int = option(32, "sequences that a rank samples between two writes to the run folder", least=1)
    output_dir: str | None = option(None, "run folder; default runs/diagnose-PRESET, numbered if taken")
    resume: bool = option(False, "go on with the run in --output_dir, if there is one")
    seed: int = option(42, "of every random draw but the bootstrap's", within=(0, 2**63))
    grader: str = option("auto", "math-verify, exact, or auto: math-verify where answers are LaTeX")
    device: str = option("auto", "auto, cpu, cuda, ...")
    dtype: str = option("auto", "auto (bfloat16 on a GPU, else float32) or its name")


PRESETS: dict[str, dict] = {
    # A solution has about 35 tokens with a choice every 7 to 8: spacing 2 lets each choice be a candidate.
    "tiny": {
        "num_problems": [300], "children": 2, "min_spacing": 2, "context": 96, "spine_tokens": 72, "batch_size": 500,
        "student_thinking": False,
    },
    # A batch ends with its longest row: the larger it is, the rarer its thin end.
    "qwen3-4b": {
        "model": "Qwen/Qwen3-4B", "num_problems": [24, 30, 30], "batch_size": 512,
        "data": ["HuggingFaceH4/MATH-500:test", "HuggingFaceH4/aime_2024:train", "yentinglin/aime_2025:train"],
    },
}  # fmt: skip
# What may differ when a run is taken up again: how it is computed.
FREE_ON_RESUME = {"resume", "output_dir", "device", "server", "batch_size"}

# The file of each phase: what a row is known by, and what else it holds. A problem is known by its place in the draw.
FILES = {
    "A_spines": (("problem",), ("temperature", "answer", "correct", "text", "ids")),
    "B_teacher": (("problem",), ("h_trunc", "teacher_p", "teacher_ids", "student_ids")),
    "C_candidates": (("problem",), ("candidates",)),
    "D_dropout": (("problem",), ("positions", "entropy", "mutual_information", "log_kappa")),
    "E_continuations": (("problem", "position", "token", "sample"), ("tokens", "answer", "correct", "text")),
}


@dataclass(frozen=True)
class Diagnosis:
    """What the phases work with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    grader: ExactGrader
    problems: list[Problem]
    config: DiagnoseConfig
    folder: Path
    prompts: Prompts = PAPER_PROMPTS

    def student_prompt(self, problem: int) -> list[int]:
        """The student's context: in phases A, B and E. Paper: silent on thinking, see docs/diagnostic.md."""
        thinks = self.config.student_thinking
        return encode_prompt(self.tokenizer, self.prompts.student, self.problems[problem], thinks, self.prompts.chat)

    def teacher_prompt(self, problem: int) -> list[int]:
        """The privileged context: in phases B and D."""
        return encode_prompt(self.tokenizer, self.prompts.diagnostic, self.problems[problem], True, self.prompts.chat)

    def rows(self, phase: str, jobs: list[tuple], work: Callable, at_once: int) -> list[dict]:
        """The phase's rows of all jobs, those from before and those that `work` finds now (records.do_jobs)."""
        return do_jobs(RowFile(self.folder / f"{phase}.jsonl", *FILES[phase]), jobs, work, at_once)

    def rows_by_problem(self, phase: str, problems: Iterable[int], work: Callable[[int], dict]) -> list[dict]:
        """The same where each problem has one row, {"problem": i} and what `work(i)` finds."""
        return self.rows(phase, [(i,) for i in problems], lambda jobs: [{"problem": i, **work(i)} for (i,) in jobs], 1)

    def graded(self, problem: int, ids: list[int]) -> dict:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        answer = extract_boxed(text)
        return {"answer": answer, "correct": self.grader.grade(text, self.problems[problem].answer), "text": text}


def spines(run: Diagnosis) -> list[dict]:
    """Phase A: greedy solutions in the student's context; where one boxes no answer, one more at T 0.7."""
    config = run.config

    def solve(indices: list[int], temperature: float) -> dict[int, dict]:
        keys = [(config.seed, SPINE_STREAM, i) for i in indices]
        settings = Sampling(temperature, TOP_P, 0, config.spine_tokens)
        responses = run.engine.sample([run.student_prompt(i) for i in indices], keys, settings)
        return {i: {"problem": i, "temperature": temperature, **run.graded(i, y.ids), "ids": y.ids}
                for i, y in zip(indices, responses, strict=True)}  # fmt: skip

    def work(jobs: list[tuple]) -> list[dict]:
        indices = [i for (i,) in jobs]
        rows = solve(indices, 0.0)
        if unboxed := [i for i in indices if rows[i]["answer"] is None]:
            rows |= solve(unboxed, FALLBACK_TEMPERATURE)
        return [rows[i] for i in indices]

    return run.rows("A_spines", [(i,) for i in range(len(run.problems))], work, config.batch_size)


def valid_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[V] True for tokens that can be an alternative step in a solution. Left out, since forcing one tests nothing:

    - ids behind the tokenizer's last (padding of the embedding matrix), special tokens and every EOS;
    - added tokens in angle brackets (`<think>`, `<tool_call>`): markup of the chat, not of the solution;
    - junk: text without a printing character (spaces, line breaks, controls), or a broken piece of a UTF-8 character.
    """
    V = model.get_output_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *eos_ids(model.generation_config, tokenizer)}
    added = tokenizer.get_added_vocab()
    markup = {i for text, i in added.items() if text.strip().startswith("<") and text.strip().endswith(">")}
    valid_V = torch.zeros(V, dtype=torch.bool)
    for i in range(min(V, len(tokenizer))):
        text = tokenizer.decode([i])
        is_junk = "\ufffd" in text or not any(c.isprintable() and not c.isspace() for c in text)
        valid_V[i] = not is_junk and i not in special and i not in markup
    return valid_V


@torch.no_grad()
def teacher_pass(run: Diagnosis, spine_rows: list[dict]) -> list[dict]:
    """Phase B: each kept spine in both contexts: h_trunc and the teacher's top valid tokens, and the student's own.

    The plausibility test of phase C uses the first two probabilities. Paper: silent on whether they are renormalised;
    here they are those of the full vocabulary.
    """
    model, K = run.model.eval(), run.config.children
    valid_V = valid_tokens(model, run.tokenizer).to(model.device)
    spine_of = {row["problem"]: row["ids"] for row in spine_rows if row["correct"]}

    def score(prompt: list[int], ids: list[int]) -> tuple[list[float], list[list[float]], list[list[int]]]:
        columns: tuple[list, list, list] = ([], [], [])
        for part_TD in response_hidden(model, [prompt], [ids])[0].split(POSITIONS_AT_ONCE):
            probability_TV = model.get_output_embeddings()(part_TD).float().softmax(dim=-1)
            h_T, p_TK, ids_TK = truncated_entropy(probability_TV, valid_V, TOP_VALID)
            for column, tensor in zip(columns, (h_T, p_TK[:, :K], ids_TK[:, :K]), strict=True):
                column += tensor.tolist()
        return columns

    def work(i: int) -> dict:
        h, p, teacher_ids = score(run.teacher_prompt(i), spine_of[i])
        _, _, student_ids = score(run.student_prompt(i), spine_of[i])
        return {"h_trunc": h, "teacher_p": p, "teacher_ids": teacher_ids, "student_ids": student_ids}

    return run.rows_by_problem("B_teacher", spine_of, work)


def first_boxed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """The smallest t such that the first t tokens contain `\\boxed`; len(ids) + 1 where none do."""
    return bisect_left(range(len(ids) + 1), True, key=lambda t: "\\boxed" in tokenizer.decode(ids[:t]))


def pick_positions(h: list[float], p: list[list[float]], end: int, config: DiagnoseConfig) -> list[int]:
    """Positions before `end` of highest h_trunc that pass p2 >= MIN_P2 and p2/p1 >= MIN_RATIO, min_spacing apart."""
    picked: list[int] = []
    for t in sorted(range(min(end, len(h))), key=lambda t: (-h[t], t)):
        p1, p2 = p[t][:2]
        is_plausible = p2 >= MIN_P2 and p2 >= MIN_RATIO * p1
        if is_plausible and all(abs(t - other) >= config.min_spacing for other in picked):
            picked.append(t)
        if len(picked) == config.candidates:
            break
    return sorted(picked)


def candidates(run: Diagnosis, spine_rows: list[dict], teacher_rows: list[dict]) -> list[dict]:
    """Phase C: the most uncertain positions of each spine, none behind a `\\boxed`, with the tokens to force there."""
    spine_of = {row["problem"]: row for row in spine_rows}
    teacher_of = {row["problem"]: row for row in teacher_rows}

    def work(i: int) -> dict:
        row, spine = teacher_of[i], spine_of[i]
        end = first_boxed(run.tokenizer, spine["ids"])
        found = [
            {"position": t, "length": len(spine["ids"]), "h_trunc": row["h_trunc"][t], "teacher_p": row["teacher_p"][t],
             "teacher": row["teacher_ids"][t], "student": row["student_ids"][t]}
            for t in pick_positions(row["h_trunc"], row["teacher_p"], end, run.config)
        ]  # fmt: skip
        return {"candidates": found}

    return run.rows_by_problem("C_candidates", teacher_of, work)


@contextmanager
def dropout_hooks(model: PreTrainedModel, layers: int, p: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, the outputs of the last `layers` blocks pass through dropout; the hooks are removed in every case."""

    def drop(block: torch.nn.Module, inputs: tuple, hidden: Tensor) -> Tensor:
        kept = torch.rand(hidden.shape, generator=generator, device=hidden.device) >= p
        return (hidden * kept / (1.0 - p)).to(hidden.dtype)

    with ExitStack() as hooks:
        for layer in model.get_decoder().layers[-layers:]:
            hooks.enter_context(layer.register_forward_hook(drop))
        yield


@torch.no_grad()
def dropout_scores(run: Diagnosis, spine_rows: list[dict], candidate_rows: list[dict]) -> list[dict]:
    """Phase D: MC-dropout scores of the teacher at each candidate: M passes of a problem in one batch and stream."""
    model, config = run.model.eval(), run.config
    spine_of = {row["problem"]: row["ids"] for row in spine_rows}
    positions_of = {row["problem"]: [c["position"] for c in row["candidates"]] for row in candidate_rows}

    def work(i: int) -> dict:
        positions = positions_of[i]
        prompt, ids = run.teacher_prompt(i), spine_of[i][: max(positions) + 1]
        M, key = PASSES, np.random.SeedSequence((config.seed, DROPOUT_STREAM, i))
        generator = torch.Generator(model.device).manual_seed(int(key.generate_state(1)[0]))
        with dropout_hooks(model, DROPPED_LAYERS, DROPOUT, generator):
            hidden_MCD = response_hidden(model, [prompt] * M, [ids] * M)[:, positions]
        probability_MCV = model.get_output_embeddings()(hidden_MCD).float().softmax(dim=-1)
        scores = {name: score_C.tolist() for name, score_C in uncertainty(probability_MCV).items()}
        return {"positions": positions, **scores}

    return run.rows_by_problem("D_dropout", [i for i, positions in positions_of.items() if positions], work)


def continuations(run: Diagnosis, spine_rows: list[dict], candidate_rows: list[dict]) -> list[dict]:
    """Phase E: the student goes on behind each forced token and, as often, with none forced (`token` null).

    A token that both teacher and student propose is sampled once and counts in both arms: the same experiment. A row
    may use the context up to its last token, whatever it is batched with.
    """
    config = run.config
    spine_of = {row["problem"]: row["ids"] for row in spine_rows}
    prompt_of = {row["problem"]: run.student_prompt(row["problem"]) for row in candidate_rows}
    jobs = []
    for row in candidate_rows:
        for c in row["candidates"]:
            forced = dict.fromkeys([*c["teacher"], *c["student"]])
            jobs += [(row["problem"], c["position"], token, n) for token in forced for n in range(config.rollouts)]
            jobs += [(row["problem"], c["position"], None, n) for n in range(config.children * config.rollouts)]

    settings = Sampling(TEMPERATURE, TOP_P, 0, config.context, config.context)

    def start(job: tuple) -> list[int]:
        """The spine up to the position, and the forced token."""
        problem, position, token, _ = job
        return spine_of[problem][:position] + ([] if token is None else [token])

    def work(jobs: list[tuple]) -> list[dict]:
        prompts = [prompt_of[job[0]] + start(job) for job in jobs]
        keys = [(config.seed, CONTINUATION_STREAM, i, t, 0 if v is None else v + 1, n) for i, t, v, n in jobs]
        responses = run.engine.sample(prompts, keys, settings)
        return [
            {"problem": job[0], "position": job[1], "token": job[2], "sample": job[3], "tokens": len(response.ids)}
            | run.graded(job[0], start(job) + response.ids)
            for job, response in zip(jobs, responses, strict=True)
        ]

    jobs.sort(key=lambda job: len(prompt_of[job[0]]) + len(start(job)))  # so that little is padded
    return run.rows("E_continuations", jobs, work, config.batch_size)


def parse_config(arguments: list[str] | None = None) -> DiagnoseConfig:
    """Flags over the preset over the paper's defaults; without --model and --preset the preset is `tiny`."""
    config = FlagParser(DiagnoseConfig, __doc__).parse(PRESETS, arguments)
    if len(config.data) != len(config.num_problems):
        raise InputError("--num_problems needs one number for each source of --data")
    return config


def draw_problems(config: DiagnoseConfig) -> list[Problem]:
    """`num_problems` from each source, without replacement, a function of the seed and the source's place in --data."""
    drawn = []
    for place, (source, count) in enumerate(zip(config.data, config.num_problems, strict=True)):
        problems = load_problems(source, False, config.columns)
        if not 1 <= count <= len(problems):
            raise InputError(f"--num_problems {count}: {source} has {len(problems)} problems")
        draw = np.random.default_rng((config.seed, PICK_STREAM, place))
        drawn += [problems[i] for i in draw.choice(len(problems), count, replace=False)]
    return drawn


def prepare(config: DiagnoseConfig, device: torch.device, folder: Path, record: dict | None = None) -> Diagnosis:
    """Everything a run needs; its config holds what this machine decided (engine, dtype) and what grades."""
    problems, prompts = draw_problems(config), load_prompts(config.prompts, date=records.first_day(record))
    grader = make_grader(config.grader, [problem.answer for problem in problems])
    model, tokenizer = load_model(config.model, config.dtype, device=device), load_tokenizer(config.model)
    if not hasattr(model.get_decoder(), "layers"):
        raise InputError(f"--model {config.model}: {type(model).__name__} has no `layers` for the dropout of phase D")
    for note in filter(None, [grader.note, *check_prompts(tokenizer, prompts, ("student", "diagnostic"))]):
        say(note)
    config = replace(config, dtype=str(model.dtype).removeprefix("torch."), grader=f"{grader.name} {grader.version}")
    if config.server:  # samples in phases A and E; B and D pass through the model here
        engine = connect(config.server, config.model, tokenizer, config.batch_size)
    else:
        engine = GenerateEngine(model, tokenizer, config.batch_size)
    run = Diagnosis(model, tokenizer, engine, grader, problems, config, folder, prompts)
    if config.context > context_length(model.config):
        raise InputError(f"--context {config.context}: the model's is {context_length(model.config)}")
    sources = np.repeat(config.data, config.num_problems)
    for i, problem in enumerate(problems):
        tokens = max(len(run.student_prompt(i)), len(run.teacher_prompt(i)))
        check_room(f"--data {sources[i]}", [problem], [tokens], config.spine_tokens + 1, config.context)
    return run


def diagnose(run: Diagnosis) -> None:
    """Phases A to G in the run's folder."""
    spine_rows = spines(run)
    teacher_rows = teacher_pass(run, spine_rows)
    candidate_rows = candidates(run, spine_rows, teacher_rows)
    dropout_rows = dropout_scores(run, spine_rows, candidate_rows)
    continuation_rows = continuations(run, spine_rows, candidate_rows)
    run.engine.close()
    run.grader.close()
    stopped, refused = np.sum(gather_objects((run.grader.stopped, run.grader.refused)), axis=0)
    if rank() > 0:
        return
    rule = LabelRule(run.config.children, run.config.rollouts)
    rows = labels(candidate_rows, dropout_rows, continuation_rows, rule)
    records.write_rows(run.folder / "F_labels.jsonl", rows)
    right = sum(row["correct"] for row in spine_rows)
    print(f"{len(spine_rows)} problems, {right} spines right, {len(continuation_rows)} continuations, "
          f"grader {run.config.grader}, {stopped} comparisons stopped at a limit, {refused} refused")  # fmt: skip
    results = {"rule": asdict(rule)}
    if rows:
        results |= table1(to_columns(rows, rule))
        print("\n".join(table1_lines(results)))
    records.write_atomically(run.folder / "table1.json", json.dumps(results, indent=2) + "\n")
    print(f"\ncontrols, Figure 1, schedule: python -m experiments.diagnose_report {run.folder}")


def main() -> None:
    config = parse_config()
    device = start_ranks(config.device)
    folder = records.new_folder(config.output_dir, f"diagnose-{config.preset or Path(config.model).name}")
    with records.open_run(folder, "diagnose", config.resume) as record:
        run = prepare(config, device, folder, record)
        inputs = records.fingerprints({"model": config.model})
        inputs |= {"data": records.digest(run.problems), "prompts": asdict(run.prompts)}
        facts = {"hardware": str(device), "date": run.prompts.chat.date}
        records.record_run(folder, "diagnose", record, asdict(run.config), FREE_ON_RESUME, inputs, facts)
        say(f"{departures(config, PRESETS) or 'the preset as it is'}; all options: {folder}/config.json")
        diagnose(run)
    stop_ranks()


if __name__ == "__main__":
    run_script(main)
