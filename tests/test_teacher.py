import pytest
import torch
from test_model import PROMPTS, RESPONSES, randomise

from model import add_lora, load_model, load_tokenizer, response_hidden
from problems import InputError, Problem
from teacher import (
    DIAGNOSTIC_PROMPT,
    EVALUATION_PROMPT,
    STUDENT_PROMPT,
    TEACHER_PROMPT,
    Teacher,
    encode_prompt,
    fill,
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
