import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from test_model import PROMPTS, RESPONSES

import teacher as teachers
import train
from chat import Chat, render_turn
from errors import InputError
from grading import ExactGrader
from model import adapter_dropout, add_lora, response_hidden, trained_parameters
from problems import Problem
from runtime.loading import check_same_tokens, load_model, load_tokenizer, match_heads
from teacher import PAPER_PROMPTS, Teacher, check_prompts, encode_prompt, fill, student_prompt, teacher_prompt

PROBLEM = Problem("What is {x} {answer} <think>?", "It is {solution} \\boxed{2}.", "2")
ASK = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def test_prompts_to_the_letter():
    assert fill(PAPER_PROMPTS.student, PROBLEM) == "Problem: What is {x} {answer} <think>?" + ASK
    assert fill(PAPER_PROMPTS.evaluation, PROBLEM) == "What is {x} {answer} <think>?" + ASK
    teacher = fill(PAPER_PROMPTS.teacher, PROBLEM)
    assert teacher.startswith(
        "Problem: What is {x} {answer} <think>?\n\nHere is a reference solution to this problem:\n"
        "=== Reference Solution Begin ===\nIt is {solution} \\boxed{2}.\n=== Reference Solution End ===\n\n\nAfter"
    )
    assert teacher.endswith(
        "each step — do not copy or paraphrase it. Now, using your own words and independent reasoning, derive the "
        "same final answer to the problem above. Think step by step, explore different approaches, and don't be "
        "afraid to backtrack or reconsider if something doesn't work out:\n\nPlease reason step by step, and put your "
        "final answer within \\boxed{}."
    )
    assert fill(PAPER_PROMPTS.diagnostic, PROBLEM) == (
        "You are a privileged teacher. Solve the problem and end your solution with the correct boxed answer. "
        "Problem: What is {x} {answer} <think>? Privileged ground-truth final answer: 2 Use the ground-truth answer "
        "above. Produce a complete step-by-step solution that ends with \\boxed{ answer }."
    )


TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
RENDERED = {  # with thinking on, and what is behind it with thinking off
    "qwen3": (TURN, "<think>\n\n</think>\n\n"),
    "llama": ("<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜><think>\n", "</think>\n\n"),
    "olmo3": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + TURN + "<think>", "</think>\n\n"),
}


@pytest.mark.parametrize("thinking", [False, True])
def test_rendered_prompts_of_the_three_families(tokenizer, family, thinking):
    """Thinking off closes an open <think>, and only the one at the end: the problem's own stays."""
    ids = encode_prompt(tokenizer, PAPER_PROMPTS.student, PROBLEM, thinking)
    turn, closed = RENDERED[family]
    expected = turn.format(fill(PAPER_PROMPTS.student, PROBLEM)) + ("" if thinking else closed)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_a_template_that_fails_is_said_in_one_line(tokenizer):
    dated = replace(PAPER_PROMPTS, chat=Chat(date="2026-11-30"))  # as in a run
    texts = (None, "{{ raise_exception('no') }}", "{% if %}", "{{ messages[7].content }}", "{{ 1 / 0 }}")
    for broken in (*texts, {"tool_use": "no default"}):
        tokenizer.chat_template = broken
        for prompts in (PAPER_PROMPTS, dated):
            with pytest.raises(InputError, match="the chat template fails" if broken else "chat template") as caught:
                student_prompt(tokenizer, PROBLEM, prompts)
            assert len(str(caught.value).splitlines()) == 1


def test_a_control_token_that_a_problem_spells_stays_text(tokenizer, family):
    """Turns, ends and thoughts are opened and closed by the template alone."""
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
    with pytest.raises(InputError, match=r"cannot encode a control token as text, in 'Problem: a </s> b"):
        student_prompt(tokenizer, Problem("a </s> b", "a", "1"))


def test_a_problem_without_control_tokens_is_encoded_in_one_piece(tokenizer):
    for text in ("if x<y and y>z, <b>, <|im", "\ue000 and \uf8fe", "\n\n  1+1"):
        problem = Problem(text, "s", "2")
        messages = [{"role": "user", "content": fill(PAPER_PROMPTS.student, problem)}]
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        whole = tokenizer.apply_chat_template(messages, **how)
        expected = tokenizer.encode(whole, add_special_tokens=False)
        assert encode_prompt(tokenizer, PAPER_PROMPTS.student, problem, enable_thinking=True) == expected


@pytest.mark.parametrize(("ending", "closed"), [
    ("<think>", "<think></think>\n\n"), ("[THINK]\n", "[THINK]\n[/THINK]\n\n"), ("</think>", "</think>"),
    ("<seed:think>", "<seed:think></seed:think>\n\n"), ("<|thinking|>", "<|thinking|>"),
    ("<think> first", "<think> first"),
])  # fmt: skip
def test_a_thought_that_is_opened_regardless_is_closed_where_thinking_is_off(tokenizer, ending, closed):
    tokenizer.chat_template = "{{ messages[0].content }}|" + f"{{{{ {ending!r} }}}}"
    on, off = (render_turn(tokenizer, "Why <think>", thinking, Chat())[0].replace("\ue000", "") for thinking in (1, 0))
    assert (on, off) == ("Why <think>|" + ending, "Why <think>|" + closed)


@pytest.mark.parametrize(("template", "kwargs", "alike"), [
    ("{{ 'deep ' if thinking }}", {}, False),  # DeepSeek V3.1's name of it
    ("{{ 'deep ' if enable_thinking }}", {}, False), ("{{ 'deep ' if reasoning_effort == 'high' }}", {}, True),
    ("{{ 'deep ' if enable_thinking }}", {"enable_thinking": True}, True), ("", {}, True),
])  # fmt: skip
def test_a_thinking_mode_without_effect_is_said(tokenizer, template, kwargs, alike):
    tokenizer.chat_template = template + "{{ messages[0].content }}"
    notes = check_prompts(tokenizer, replace(PAPER_PROMPTS, chat=Chat(kwargs)))
    assert ["both thinking modes alike" in note for note in notes] == [True] * alike


def test_arguments_of_the_template_reach_both_contexts(tokenizer):
    tokenizer.chat_template = "{{ reasoning_effort }}: {{ messages[0].content }}"
    prompts = teachers.load_prompts(None, '{"reasoning_effort": "high"}')
    for prompt in (student_prompt, teacher_prompt):
        assert tokenizer.decode(prompt(tokenizer, PROBLEM, prompts)).startswith("high: Problem: What is")
    for name in ("tokenize", "conversation"):
        with pytest.raises(InputError, match=f"the chat template fails .*'{name}'"):
            student_prompt(tokenizer, PROBLEM, replace(PAPER_PROMPTS, chat=Chat({name: 1})))
    for text in ("{", "[1]", "3", '{"chat_template": "x"}', '{"enable_thinking": true}', '{"thinking": false}'):
        with pytest.raises(InputError, match="--chat_template_kwargs"):
            teachers.load_prompts(None, text)


def test_a_teacher_that_is_shown_nothing_is_said(tokenizer):
    said = "the teacher is shown neither solution nor answer"
    for template, is_said in (("{problem}", True), ("{problem} = {answer}", False)):
        prompts = replace(PAPER_PROMPTS, teacher=template)
        assert (said in check_prompts(tokenizer, prompts)) == is_said
        assert said not in check_prompts(tokenizer, prompts, ("student",))


def test_the_date_of_a_template_stands_still(tokenizer):
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[0].content }}{{ enable_thinking }}"
    prompts = teachers.load_prompts(None, None, "2026-02-03")
    assert tokenizer.decode(student_prompt(tokenizer, PROBLEM, prompts)).startswith("Today is 03 Feb 2026. Problem:")
    assert check_prompts(tokenizer, prompts) == ["the chat template shows the date: 2026-02-03"]
    assert "each day" in check_prompts(tokenizer, PAPER_PROMPTS)[0]


@pytest.mark.parametrize(("template", "lost"), [
    ("Solve it.", "{problem} of the student's prompt"),
    ("{{ messages[0].content[0].text }}", "{problem} of the student's prompt"),  # it takes a list of parts
    ("{{ messages[0].content[:90] }}", "{solution} of the teacher's prompt"),
    ("{{ '' if enable_thinking else messages[0].content }}", "{problem} of the student's prompt"),
])  # fmt: skip
def test_a_template_that_drops_what_a_prompt_shows_is_refused(tokenizer, template, lost):
    assert check_prompts(tokenizer, PAPER_PROMPTS, ("student", "teacher", "evaluation", "diagnostic")) == []
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"does not show the text of a turn: {lost}") as caught:
        check_prompts(tokenizer, PAPER_PROMPTS)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def student(model):
    add_lora(model, rank=4, alpha=8.0)
    return model


@pytest.fixture(params=["lora", "all weights"])
def any_student(request, model):
    return request.getfixturevalue("student") if request.param == "lora" else model


def states(model):
    return response_hidden(model, PROMPTS, RESPONSES)


def move(student) -> list[torch.Tensor]:
    """As an optimizer does; returns what is trained, moved."""
    torch.manual_seed(3)
    for parameter in trained_parameters(student):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return [p.detach().clone() for p in trained_parameters(student)]


def test_fixed_teacher_stays_the_base(any_student):
    with torch.no_grad():
        base = states(any_student)
    teacher = Teacher(any_student, "fixed")
    move(any_student)
    teacher.update()
    with teacher.scoring() as scorer:
        assert torch.equal(states(scorer), base)
        assert not states(scorer).requires_grad
    assert not torch.equal(states(any_student), base)
    assert teacher.scorer is any_student or not any(p.requires_grad for p in teacher.scorer.parameters())


def test_ema_teacher_averages(any_student):
    """From w0 to w1 it is .75 w0 + .25 w1; the student is left as it was. Of all weights there are two sets alone."""
    trained = trained_parameters(any_student)
    before = [p.detach().clone() for p in trained]
    teacher = Teacher(any_student, "ema", ema_decay=0.75)
    after = move(any_student)
    teacher.update()
    with teacher.scoring() as scorer:
        scored = states(scorer)
    assert all(torch.equal(p, w1) for p, w1 in zip(trained, after, strict=True))
    copied = [] if teacher.scorer is any_student else list(teacher.scorer.parameters())
    assert len({p.data_ptr() for p in [*trained, *copied, *teacher.average]}) == 2 * len(trained)
    for parameter, w0, w1 in zip(trained, before, after, strict=True):
        parameter.data = 0.75 * w0 + 0.25 * w1
    torch.testing.assert_close(scored, states(any_student))


@pytest.mark.parametrize("kind", ["fixed", "ema"])
def test_the_student_is_itself_again_after_an_exception_while_scoring(student, kind):
    teacher = Teacher(student, kind, ema_decay=0.5)
    move(student)
    teacher.update()
    before, average = states(student), [tensor.clone() for tensor in teacher.average]
    with pytest.raises(RuntimeError, match="while scoring"), teacher.scoring() as scorer:
        assert not torch.equal(states(scorer), before)
        raise RuntimeError("while scoring")
    assert torch.equal(states(student), before) and torch.is_grad_enabled()
    assert all(map(torch.equal, teacher.average, average))


@pytest.mark.parametrize("kind", ["ema", "live"])
def test_a_live_teacher_and_an_ema_of_decay_0_are_the_student_and_drop_nothing_while_it_does(model, kind):
    add_lora(model, rank=4, alpha=8.0, dropout=0.5)
    teacher = Teacher(model, kind, ema_decay=0.0)
    move(model)
    teacher.update()
    still = states(model)
    with adapter_dropout(model):
        with teacher.scoring() as scorer:
            assert torch.equal(states(scorer), still)
        assert not torch.equal(states(model), still)


def test_another_model_teaches_through_its_own_body_and_head(student, checkpoint):
    """Sizes of one family pad their heads to different multiples: rows of padding are cut, missing ones are said."""
    rows, other = len(student.get_output_embeddings().weight), load_model(checkpoint, device="cpu")
    with torch.no_grad():
        own = other.get_output_embeddings().weight.mul_(2.0).clone()
        before = states(other)
    other.resize_token_embeddings(rows + 7, mean_resizing=False)
    match_heads(student, other)
    teacher = Teacher(student, "other", other=other)
    teacher.update()
    with teacher.scoring() as scorer:
        assert scorer is other and torch.equal(states(scorer), before)
        assert torch.equal(scorer.get_output_embeddings().weight, own)
    other.resize_token_embeddings(rows - 1, mean_resizing=False)
    with pytest.raises(InputError, match=f"its head has {rows - 1} rows, the student's {rows}"):
        match_heads(student, other)


def test_another_vocabulary_or_template_is_said(checkpoint):
    mine, theirs = load_tokenizer(checkpoint), load_tokenizer(checkpoint)
    check_same_tokens(mine, theirs, PAPER_PROMPTS, "other")
    for more in ("{{ bos_token }}Q: ", "{% if enable_thinking %}Think.{% endif %}"):  # the teacher alone thinks
        theirs.chat_template = more + mine.chat_template
        with pytest.raises(InputError, match=r"--teacher other: .*encodes a prompt otherwise"):
            check_same_tokens(mine, theirs, PAPER_PROMPTS, "other")
    theirs = load_tokenizer(checkpoint)
    theirs.add_tokens(["<more>"])
    for one, two in ((mine, theirs), (theirs, mine)):
        with pytest.raises(InputError, match=r"its vocabulary is not the student's \(.*<more>"):
            check_same_tokens(one, two, PAPER_PROMPTS, "other")


# One step of training, seen from the teacher


def first_step(checkpoint, change=lambda run: None, **options) -> dict:
    """Metrics of one step of four short rollouts."""
    few = {"batch_size": 4, "max_new_tokens": 12, "lora_rank": 4, "micro_batch_size": 2, "num_steps": 2}
    config = train.TrainConfig(**{"model": str(checkpoint), "dtype": "float32", **few, **options})
    data, prompts = train.choose_prompts(config, SUMS)
    run = train.build(config, torch.device("cpu"), ExactGrader(), prompts)
    change(run)
    return train.train_step(0, run, data, config)[0]


def test_identical_contexts_have_a_first_loss_of_zero_whatever_the_base_drops(qwen3, tmp_path):
    """Same prompt, same mode, same weights; the config asks for attention dropout while training."""
    shutil.copytree(qwen3, tmp_path / "m")
    config = json.loads((qwen3 / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    for checkpointing in (False, True):
        same = {"reference": "none", "teacher_thinking": False, "gradient_checkpointing": checkpointing}
        assert first_step(tmp_path / "m", **same)["loss"] == 0.0
    assert first_step(tmp_path / "m")["loss"] != 0.0


@pytest.mark.parametrize(("kind", "apart"), [("fixed", True), ("live", False)])
def test_where_the_head_is_trained_a_fixed_teacher_keeps_its_own(checkpoint, kind, apart):
    """Identical contexts, and the student's head has moved: one head read for both would give a loss of zero."""

    def move_head(run):
        with torch.no_grad():
            run.model.get_output_embeddings().weight.mul_(0.5)

    same = {"reference": "none", "teacher_thinking": False, "teacher": kind, "lora_rank": 0}
    assert (first_step(checkpoint, move_head, **same)["loss"] != 0.0) is apart


def test_dropout_masks_are_drawn_anew_in_each_step_and_run():
    def draw(*key):
        train.seed_step(*key)
        return torch.rand(4).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(*key)) for key in ((1, 2), (1, 3), (2, 2), (2, 1))}) == 4


# What the teacher is shown

SUMS = [Problem(f"{a}+1", f"{a}+1=\\boxed{{{a + 1}}}", str(a + 1)) for a in range(1, 8)]


def chosen(kind: str, seed: int = 0) -> tuple[list[Problem], teachers.Prompts]:
    return teachers.choose_reference(kind, SUMS, PAPER_PROMPTS, np.random.default_rng(seed))


def test_references_by_hand():
    assert chosen("own") == (SUMS, PAPER_PROMPTS)
    answers, _ = chosen("answer")
    assert [p.solution for p in answers] == ["2", "3", "4", "5", "6", "7", "8"]
    none, prompts = chosen("none")
    assert {p.solution for p in none} == {""}
    assert (prompts.teacher, prompts.teacher_thinking) == (PAPER_PROMPTS.student, True)


def test_another_problems_reference_is_never_ones_own_and_each_is_used_once():
    for seed in range(20):
        others, _ = chosen("other", seed)
        assert sorted(p.solution for p in others) == sorted(p.solution for p in SUMS)
        assert all(given.solution != own.solution for given, own in zip(others, SUMS, strict=True))
    assert chosen("other", 1) == chosen("other", 1) != chosen("other", 2)


@pytest.mark.parametrize("kind", teachers.REFERENCES)
def test_the_student_never_sees_the_reference(tokenizer, kind):
    """The student's ids are those of the bare problem; the teacher's hold what the option says."""
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
            assert teacher_prompt(tokenizer, given, prompts) == encode_prompt(tokenizer, prompts.student, own, True)


def test_wrong_references_are_said():
    with pytest.raises(InputError, match="own, other, none, answer"):
        chosen("hers")
    shown = replace(PAPER_PROMPTS, teacher="{problem} is {answer}")
    for kind, prompts in (("answer", PAPER_PROMPTS), ("own", shown)):
        with pytest.raises(InputError, match="shown answers; problem 1 has none"):
            teachers.choose_reference(kind, [SUMS[0], Problem("a", "b", "")], prompts, np.random.default_rng(0))
    with pytest.raises(InputError, match="there is only one"):
        teachers.choose_reference("other", SUMS[:1], PAPER_PROMPTS, np.random.default_rng(0))
    for kind in teachers.REFERENCES:
        given = kind, SUMS, replace(PAPER_PROMPTS, teacher="{problem} = {answer}"), np.random.default_rng(0)
        with pytest.raises(InputError, match="--prompts") if kind in ("other", "answer") else nullcontext():
            teachers.choose_reference(*given)


def test_templates_from_a_file(checkpoint, tmp_path):
    path = tmp_path / "prompts.json"
    text = json.dumps({"teacher": "{problem} \\frac{a}{b} It is {answer}: {solution}"})
    path.write_text("\ufeff" + text, encoding="utf-8")
    prompts = teachers.load_prompts(str(path))
    assert prompts == replace(PAPER_PROMPTS, teacher="{problem} \\frac{a}{b} It is {answer}: {solution}")
    assert fill(prompts.teacher, SUMS[0]) == "1+1 \\frac{a}{b} It is 2: 1+1=\\boxed{2}"
    assert teachers.load_prompts(None) == PAPER_PROMPTS


@pytest.mark.parametrize(("content", "words"), [
    ("not json", "cannot be read as JSON"), ("[" * 100_000, "cannot be read as JSON"),
    ("[]", "must be an object with some of student, teacher"),
    ('{"pupil": "{problem}"}', "must be an object"), ('{"student": 1}', "student: {problem} is missing"),
    ('{"student": "{question}"}', "student: {problem} is missing"),
    ('{"student": "{problem} \\\\boxed{answer}"}', "student: must not show {answer}"),
    ('{"evaluation": "{problem} {solution}"}', "evaluation: must not show {solution}"),
    ('{"evaluation": "{problem} {answer}"}', "evaluation: must not show {answer}"),
    ('{"diagnostic": "{problem}"}', "diagnostic: {answer} is missing"),
])  # fmt: skip
def test_wrong_templates_name_file_and_template(tmp_path, content, words):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        teachers.load_prompts(str(path))
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_contexts_have_their_own_prompt_and_each_thinks_as_asked(tokenizer):
    swapped = replace(PAPER_PROMPTS, student_thinking=True, teacher_thinking=False)
    for prompts, on in ((PAPER_PROMPTS, False), (swapped, True)):
        assert student_prompt(tokenizer, PROBLEM, prompts) == encode_prompt(tokenizer, prompts.student, PROBLEM, on)
        assert teacher_prompt(tokenizer, PROBLEM, prompts) == encode_prompt(tokenizer, prompts.teacher, PROBLEM, not on)
    assert PROBLEM.solution not in tokenizer.decode(student_prompt(tokenizer, PROBLEM))
