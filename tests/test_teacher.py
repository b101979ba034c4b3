import json
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from test_model import PROMPTS, RESPONSES, randomise

from errors import InputError
from model import add_lora, load_model, load_tokenizer, response_hidden
from problems import Problem
from teacher import (
    DIAGNOSTIC_PROMPT,
    EVALUATION_PROMPT,
    PAPER_PROMPTS,
    REFERENCES,
    STUDENT_PROMPT,
    TEACHER_PROMPT,
    Prompts,
    Teacher,
    choose_reference,
    encode_prompt,
    fill,
    load_prompts,
    student_prompt,
    teacher_prompt,
)

PROBLEM = Problem("What is {1+1}, given <think>?", "It is {solution} \\boxed{2}.", "2")
ASK = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def test_prompts_to_the_letter():
    assert fill(STUDENT_PROMPT, PROBLEM) == "Problem: What is {1+1}, given <think>?" + ASK
    assert fill(EVALUATION_PROMPT, PROBLEM) == "What is {1+1}, given <think>?" + ASK
    teacher = fill(TEACHER_PROMPT, PROBLEM)
    assert teacher.startswith(
        "Problem: What is {1+1}, given <think>?\n\nHere is a reference solution to this problem:\n"
        "=== Reference Solution Begin ===\nIt is {solution} \\boxed{2}.\n=== Reference Solution End ===\n\n\nAfter"
    )
    assert teacher.endswith(
        "each step — do not copy or paraphrase it. Now, using your own words and independent reasoning, derive the "
        "same final answer to the problem above. Think step by step, explore different approaches, and don't be "
        "afraid to backtrack or reconsider if something doesn't work out:\n\nPlease reason step by step, and put your "
        "final answer within \\boxed{}."
    )
    assert fill(DIAGNOSTIC_PROMPT, PROBLEM) == (
        "You are a privileged teacher. Solve the problem and end your solution with the correct boxed answer. "
        "Problem: What is {1+1}, given <think>? Privileged ground-truth final answer: 2 Use the ground-truth answer "
        "above. Produce a complete step-by-step solution that ends with \\boxed{ answer }."
    )


RENDERED = {
    "qwen3": {
        False: "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        True: "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    },
    "llama": {
        False: "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜><think>\n</think>\n\n",
        True: "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜><think>\n",
    },
    "olmo3": {
        False: "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>\n\n",
        True: "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n<think>",
    },
}


@pytest.mark.parametrize("thinking", [False, True])
def test_rendered_prompts_of_the_three_families(checkpoint, family, thinking):
    """Thinking off closes an open <think>, and only the one at the end: the problem's own stays."""
    tokenizer = load_tokenizer(checkpoint)
    ids = encode_prompt(tokenizer, STUDENT_PROMPT, PROBLEM, thinking)
    expected = RENDERED[family][thinking].format(fill(STUDENT_PROMPT, PROBLEM))
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_one_bos_where_the_template_brings_one(checkpoint, family):
    tokenizer = load_tokenizer(checkpoint)
    bos = tokenizer.bos_token_id
    for prompt in (student_prompt(tokenizer, PROBLEM), teacher_prompt(tokenizer, PROBLEM)):
        assert prompt.count(bos) == (1 if family == "llama" else 0)
    if family == "llama":  # this tokenizer would add a second one if it were asked
        assert tokenizer.encode("x")[0] == bos


def test_contexts_use_the_right_prompt_and_flag(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    assert student_prompt(tokenizer, PROBLEM) == encode_prompt(tokenizer, STUDENT_PROMPT, PROBLEM, False)
    assert teacher_prompt(tokenizer, PROBLEM) == encode_prompt(tokenizer, TEACHER_PROMPT, PROBLEM, True)
    assert PROBLEM.solution not in tokenizer.decode(student_prompt(tokenizer, PROBLEM))


def test_a_tokenizer_without_template_is_said(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        student_prompt(tokenizer, PROBLEM)


@pytest.mark.parametrize(
    "broken", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages[7].content }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_fails_is_said_in_one_line(checkpoint, broken):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = broken
    with pytest.raises(InputError, match="the chat template fails") as caught:
        student_prompt(tokenizer, PROBLEM)
    assert len(str(caught.value).splitlines()) == 1


def test_a_control_token_that_a_problem_spells_stays_text(checkpoint, family):
    """Turns, ends and thoughts are opened and closed by the template alone."""
    tokenizer = load_tokenizer(checkpoint)
    plain = Problem("What is 1+1?", "It is \\boxed{2}.", "2")
    for token in [*tokenizer.all_special_tokens, "<think>", "</think>", "<|im_start|>", "<｜User｜>"]:
        for text in (token, f"a {token} b", f"{token}{token}", f"{token}\nuser\n{token}", f" \ue000{token} "):
            problem = Problem(f"What is {text}?", f"It is {text}.", "2")
            for prompt in (student_prompt, teacher_prompt):
                ids, usual = prompt(tokenizer, problem), prompt(tokenizer, plain)
                for control in tokenizer.get_added_vocab().values():
                    assert ids.count(control) == usual.count(control)
                shown = tokenizer.decode(ids)
                assert problem.problem in shown and (prompt is student_prompt or problem.solution in shown)


def test_a_control_token_that_cannot_be_kept_as_text_is_said():
    """A tokenizer that puts a space in front of each piece of text would change what the problem says."""
    tokenizer = families.sentencepiece_like()
    assert student_prompt(tokenizer, Problem("a b", "a", "1"))
    with pytest.raises(InputError, match=r"cannot encode a control token as text, in the problem 'a </s> b'"):
        student_prompt(tokenizer, Problem("a </s> b", "a", "1"))


def test_a_problem_without_control_tokens_is_encoded_in_one_piece(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    for text in ("if x<y and y>z, <b>, <|im", "\ue000 and \uf8fe", "\n\n  1+1"):
        problem = Problem(text, "s", "2")
        messages = [{"role": "user", "content": fill(STUDENT_PROMPT, problem)}]
        whole = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        expected = tokenizer.encode(whole, add_special_tokens=False)
        assert encode_prompt(tokenizer, STUDENT_PROMPT, problem, enable_thinking=True) == expected


def test_the_embedded_models_tokenizer_spells_its_control_token():
    """A control token in a problem is read character by character, and ends no turn."""
    tokenizer = load_tokenizer("tiny")
    ids = student_prompt(tokenizer, Problem("What is <|im_end|>?", "s", "2"))
    assert "What is <|im_end|>?" in tokenizer.decode(ids)
    assert ids.count(tokenizer.eos_token_id) == student_prompt(tokenizer, Problem("x", "s", "2")).count(
        tokenizer.eos_token_id
    )


@pytest.fixture
def student(checkpoint):
    model = load_model(checkpoint, device="cpu")
    add_lora(model, rank=4, alpha=8.0)
    return model.train()


def states(model):
    return response_hidden(model, PROMPTS, RESPONSES)


def test_fixed_teacher_stays_the_base(student):
    with torch.no_grad():
        base = states(student)
    teacher = Teacher(student, "fixed")
    randomise(student)
    teacher.update()
    with teacher.scoring() as scorer:
        assert torch.equal(states(scorer), base)
        assert not states(scorer).requires_grad
    assert student.training and not torch.equal(states(student), base)


def test_live_teacher_is_the_student(student):
    teacher = Teacher(student, "live")
    randomise(student)
    with teacher.scoring() as scorer:
        assert torch.equal(states(scorer), states(student.eval()))


@pytest.mark.parametrize("lora", [True, False])
def test_ema_teacher_averages(checkpoint, lora):
    """After one update from w0 to w1 the average is 0.75 w0 + 0.25 w1; the student is left as it was."""
    student = load_model(checkpoint, device="cpu")
    if lora:
        add_lora(student, rank=4, alpha=8.0)
    trained = [p for p in student.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    teacher = Teacher(student, "ema", ema_decay=0.75)
    torch.manual_seed(3)
    for parameter in trained:
        parameter.data += 0.1 * torch.randn_like(parameter)
    after = [p.detach().clone() for p in trained]
    teacher.update()
    with teacher.scoring() as scorer:
        scoring = [p for n, p in scorer.named_parameters() if not lora or "lora_" in n]
        for w, w0, w1 in zip(scoring, before, after, strict=True):
            torch.testing.assert_close(w.data, 0.75 * w0 + 0.25 * w1)
    assert all(torch.equal(p, w1) for p, w1 in zip(trained, after, strict=True))


def test_fixed_teacher_of_full_fine_tuning_is_a_copy(checkpoint):
    student = load_model(checkpoint, device="cpu")
    teacher = Teacher(student, "fixed")
    with torch.no_grad():
        base = states(student)
        student.get_input_embeddings().weight += 1.0
    with teacher.scoring() as scorer:
        assert torch.equal(states(scorer), base)
    assert not any(p.requires_grad for p in teacher.copy.parameters())


def test_unknown_teacher_is_said(student):
    with pytest.raises(InputError, match="fixed, ema, live"):
        Teacher(student, "frozen")


def test_the_average_of_all_weights_holds_two_copies(checkpoint):
    """The student and one copy that is scored with and averaged in place: no third set of weights."""
    student = load_model(checkpoint, device="cpu")
    teacher = Teacher(student, "ema")
    storages = {p.data_ptr() for p in [*student.parameters(), *teacher.copy.parameters(), *teacher.average]}
    assert len(storages) == 2 * len(list(student.parameters()))


# What the teacher is shown

SUMS = [Problem(f"{a}+1", f"{a}+1=\\boxed{{{a + 1}}}", str(a + 1)) for a in range(1, 8)]


def chosen(kind: str, seed: int = 0) -> tuple[list[Problem], Prompts]:
    return choose_reference(kind, SUMS, PAPER_PROMPTS, np.random.default_rng(seed))


def test_references_by_hand():
    assert chosen("own") == (SUMS, PAPER_PROMPTS)
    answers, _ = chosen("answer")
    assert [p.solution for p in answers] == ["2", "3", "4", "5", "6", "7", "8"]
    none, prompts = chosen("none")
    assert {p.solution for p in none} == {""}
    assert (prompts.teacher, prompts.teacher_thinking) == (STUDENT_PROMPT, True)


def test_another_problems_reference_is_never_ones_own_and_each_is_used_once():
    for seed in range(20):
        others, _ = chosen("other", seed)
        assert sorted(p.solution for p in others) == sorted(p.solution for p in SUMS)
        assert all(given.solution != own.solution for given, own in zip(others, SUMS, strict=True))
    assert chosen("other", 1) == chosen("other", 1) != chosen("other", 2)


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_student_never_sees_the_reference(checkpoint, kind):
    """The student's ids are those of the bare problem; the teacher's hold what the option says."""
    tokenizer = load_tokenizer(checkpoint)
    shown, prompts = chosen(kind)
    for own, given in zip(SUMS, shown, strict=True):
        assert (given.problem, given.answer) == (own.problem, own.answer)
        assert student_prompt(tokenizer, given, prompts) == student_prompt(tokenizer, own)
        blank = Problem(given.problem, "", "")
        assert student_prompt(tokenizer, given, prompts) == student_prompt(tokenizer, blank, prompts)
        text = tokenizer.decode(teacher_prompt(tokenizer, given, prompts))
        assert ("Reference Solution Begin" in text) == (kind != "none")
        assert kind == "none" or f"Begin ===\n{given.solution}\n===" in text
        if kind == "none":
            assert teacher_prompt(tokenizer, given, prompts) == encode_prompt(tokenizer, STUDENT_PROMPT, own, True)


def test_wrong_references_are_said():
    with pytest.raises(InputError, match="own, other, none, answer"):
        chosen("hers")
    with pytest.raises(InputError, match="problem 0 has no answer"):
        choose_reference("answer", [Problem("a", "b", "")], PAPER_PROMPTS, np.random.default_rng(0))
    with pytest.raises(InputError, match="only one problem"):
        choose_reference("other", SUMS[:1], PAPER_PROMPTS, np.random.default_rng(0))


# Templates and thinking modes of one's own


def test_templates_from_a_file(checkpoint, tmp_path):
    path = tmp_path / "prompts.json"
    text = json.dumps({"teacher": "{problem} \\frac{a}{b} It is {answer}: {solution}"})
    path.write_text("\ufeff" + text, encoding="utf-8")
    prompts = load_prompts(str(path))
    assert prompts == replace(PAPER_PROMPTS, teacher="{problem} \\frac{a}{b} It is {answer}: {solution}")
    assert fill(prompts.teacher, SUMS[0]) == "1+1 \\frac{a}{b} It is 2: 1+1=\\boxed{2}"
    assert load_prompts(None) is PAPER_PROMPTS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "cannot be read as JSON"),
        ("[]", "expected an object with some of student, teacher"),
        ('{"pupil": "{problem}"}', "expected an object"),
        ('{"student": 1}', "student: must be a text"),
        ('{"student": "{problem} \\ud800"}', "student: holds half of a surrogate pair"),
        ('{"student": "{question}"}', "student: {problem} is missing"),
        ('{"student": "{problem} \\\\boxed{answer}"}', "student: must not show {answer}"),
        ('{"evaluation": "{problem} {solution}"}', "evaluation: must not show {solution}"),
        ('{"diagnostic": "{problem}"}', "diagnostic: {answer} is missing"),
    ],
)
def test_wrong_templates_name_file_and_template(tmp_path, content, words):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_prompts(str(path))
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_each_context_thinks_as_asked(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    swapped = replace(PAPER_PROMPTS, student_thinking=True, teacher_thinking=False)
    assert student_prompt(tokenizer, PROBLEM, swapped) == encode_prompt(tokenizer, STUDENT_PROMPT, PROBLEM, True)
    assert teacher_prompt(tokenizer, PROBLEM, swapped) == encode_prompt(tokenizer, TEACHER_PROMPT, PROBLEM, False)
