"""Which problems fit, and how few of them are tokenised to know it."""

import random
from dataclasses import dataclass, replace

import families
import pytest
from tokenizers import normalizers, pre_tokenizers

import runtime.fit as fit
from errors import InputError
from model import load_tokenizer
from problems import Problem
from runtime.fit import fitting_problems, token_bounds
from teacher import PAPER_PROMPTS, student_prompt, teacher_prompt


@dataclass
class Config:
    data: str = "data.jsonl"
    max_length: int = 2000
    max_new_tokens: int = 100
    long_prompts: str = "drop"


ODD = "aé€😀ﷺ漢 \n\t\\{}$<>01½Å\u0301\u1100\u1161\U0001d160"  # among them what Unicode's normal forms make longer


def odd_problems(count: int, longest: int, controls: bool = True) -> list[Problem]:
    draw = random.Random(0)

    def text() -> str:
        odd = "".join(draw.choices(ODD, k=draw.randint(1, longest)))
        return odd + draw.choice(["", "<think>", "<|im_end|>"]) * controls

    return [Problem(text(), text(), "1") for _ in range(count)]


def longest(tokenizer, problem: Problem) -> int:
    return max(len(prompt(tokenizer, problem)) for prompt in (student_prompt, teacher_prompt))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "olmo3", "nfc", "nfkd", "prefix", "sentencepiece"])
def test_no_prompt_has_more_tokens_than_its_bound(kind):
    tokenizer = families.sentencepiece_like() if kind == "sentencepiece" else families.make_tokenizer(
        kind if kind in families.TEMPLATES else "qwen3"
    )  # fmt: skip
    if kind == "nfc":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    if kind == "nfkd":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKD()
    if kind == "prefix":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    problems = odd_problems(40, 200, controls=kind not in ("prefix", "sentencepiece"))  # there they are an error
    bounds = token_bounds(tokenizer, PAPER_PROMPTS, problems)
    for problem, bound in zip(problems, bounds, strict=True):
        assert longest(tokenizer, problem) <= bound


def test_the_bound_is_not_far_above_bytes(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    (bound,) = token_bounds(tokenizer, PAPER_PROMPTS, [Problem("x" * 1000, "y" * 5000, "1")])
    assert 6000 < bound < 8000


def test_a_template_that_changes_the_text_has_no_bound(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = "{%- for m in messages %}{{ m.content|replace('a', 'aaaaaaaaaa') }}{%- endfor %}"
    assert token_bounds(tokenizer, PAPER_PROMPTS, odd_problems(2, 5)) == [None, None]


def test_what_fits_is_what_tokenising_everything_says(checkpoint, monkeypatch):
    tokenizer, problems, counted = load_tokenizer(checkpoint), odd_problems(120, 1500), []
    original = fit.count_tokens

    def spy(tokenizer, prompts, problems, wanted):
        counted.extend(wanted)
        return original(tokenizer, prompts, problems, wanted)

    monkeypatch.setattr(fit, "count_tokens", spy)
    monkeypatch.setattr(fit, "LONGEST", 4)
    found = fitting_problems(problems, tokenizer, PAPER_PROMPTS, 10**6, replace(Config(), max_length=5000))
    lengths = {problem: longest(tokenizer, problem) for problem in problems}
    assert found.problems == [problem for problem in problems if lengths[problem] <= 4900]
    assert 0 < len(found.problems) < len(problems) and len(counted) == len(set(counted)) < len(problems)
    assert found.teacher_tokens == max(len(teacher_prompt(tokenizer, p)) for p in found.problems)


def test_too_long_is_named_by_the_first(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    problems = [Problem("a", "b", "1"), Problem("a", "b " * 3000, "1"), Problem("a", "b " * 4000, "1")]
    with pytest.raises(InputError, match=r"data.jsonl, problem 1: a prompt of \d+ tokens .* exceed 2000"):
        fitting_problems(problems, tokenizer, PAPER_PROMPTS, 10**6, Config(long_prompts="error"))
    with pytest.raises(InputError, match="no problem fits into 2000 tokens"):
        fitting_problems(problems[1:], tokenizer, PAPER_PROMPTS, 10**6, Config())
    assert fitting_problems(problems, tokenizer, PAPER_PROMPTS, 10**6, Config()).problems == problems[:1]
