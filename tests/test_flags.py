"""Flags: a wrong value names the flag that was typed; --help keeps its form; presets and departures from them."""

from dataclasses import fields

import pytest

import diagnose
import evaluate
import train
from errors import InputError
from evaluate import EvaluationConfig
from runtime.flags import FlagParser, departures
from train import PRESETS, TrainConfig, parse_config

# One value out of range for each flag whose value is checked before anything is loaded, and numbers that fill memories.
WRONG = {
    TrainConfig: """
        preset=qwen method=dpo teacher=frozen ema_decay=1.5 prompts=nowhere.json chat_template_kwargs=[1] max_length=0
        eval_steps=-1 max_new_tokens=0 temperature=-1 temperature=nan temperature=1e-39 top_p=0 top_k=-1 num_steps=0
        batch_size=0 batch_size=1000000000000 micro_batch_size=0 learning_rate=nan max_grad_norm=0 lora_rank=-1
        lora_alpha=inf lora_dropout=1 seed=-1 save_steps=0 distill_temperature=0 tau_clip=-1 beta=2
        schedule=steep w_min=2 tau=nan s=0 reduction=sum
    """,
    EvaluationConfig: """
        adapter=nowhere num_samples=0 num_samples=1000000000000 seeds=-1 temperature=-1 top_p=1.1 top_k=-1
        max_new_tokens=0 batch_size=0 device=abacus limit=0 chat_template_kwargs={"thinking":true}
    """,
}
NO_FLAG_OR_NUMBER = {
    TrainConfig: "num_steps=many micro_batch_size=half resume=perhaps batch=8 clip=0.05 rollout_temperature=1.0",
    EvaluationConfig: "seeds=zero no_such_flag=1",
}


def cases(table: dict[type, str]) -> list[tuple[type, str]]:
    return [(config, word) for config, words in table.items() for word in words.split()]


def parse(config: type, *arguments: str) -> object:
    """Flags as the script takes them, with its checks."""
    if config is TrainConfig:
        return parse_config(list(arguments))
    parsed = FlagParser(config, None).parse(arguments=list(arguments))
    evaluate.check_config(parsed)
    return parsed


@pytest.mark.parametrize(("config", "word"), cases(WRONG))
def test_a_wrong_value_names_the_flag_that_was_typed(config, word, tmp_path, monkeypatch, call):
    with pytest.raises(InputError) as caught:
        if word.startswith("device"):  # met where the ranks start
            monkeypatch.chdir(tmp_path)
            call(evaluate, f"--{word}")
        parse(config, f"--{word}")
    flag, value = word.split("=")
    message = str(caught.value)
    assert message.startswith(f"--{flag}") and "\n" not in message and value in message


@pytest.mark.parametrize(("config", "word"), cases(NO_FLAG_OR_NUMBER))
def test_what_is_no_flag_or_no_number_is_one_line(config, word):
    with pytest.raises(InputError, match=f"--{word.split('=')[0]}") as caught:
        parse(config, f"--{word}")
    assert "\n" not in str(caught.value) and "--help" in str(caught.value)


@pytest.mark.parametrize(("module", "config"), [(train, TrainConfig), (evaluate, EvaluationConfig)])
def test_help_has_the_docstring_and_every_flag(module, config, call, capsys):
    with pytest.raises(SystemExit):
        call(module, "--help")
    text = capsys.readouterr().out
    assert module.__doc__.strip() in text and all(f"  --{f.name} " in text for f in fields(config))


@pytest.mark.parametrize(("words", "with_"), [
    ("--method eopd --tau_clip 0.2", "--method opsd or pwopsd"), ("--switch_step 3", "--method reopold"),
    ("--method reopold --beta 1.0", "--method opsd or pwopsd"), ("--ema_decay 0.5", "--teacher ema"),
    ("--method reopold --schedule uniform --switch_step 3", "--method reopold, without --schedule"),
    ("--eval_data= --eval_steps 5", "--eval_data"), ("--lora_rank 0 --lora_alpha 7.0", "--lora_rank above 0"),
    ("--lora_rank 0 --lora_dropout 0.05", "--lora_rank above 0"),
])  # fmt: skip
def test_a_flag_that_would_change_nothing_is_refused(words, with_):
    with pytest.raises(InputError, match=f"{' '.join(words.split()[-2:])}: counts only with {with_}"):
        parse_config(words.split())


def test_only_what_changes_no_number_may_change_on_resume():
    free = {"output_dir", "device"}
    training = {"resume", "micro_batch_size", "gradient_checkpointing", "save_steps", "server", "shard"}
    assert free | training == train.FREE_ON_RESUME
    assert free | {"num_samples", "seeds", "batch_size", "grader"} == evaluate.FREE_ON_RESUME
    assert free | {"resume", "server", "batch_size"} == diagnose.FREE_ON_RESUME


def test_the_servers_dtype_is_not_the_scripts():
    with pytest.raises(InputError, match="--dtype float32: with --server that of the server holds"):
        evaluate.check_config(EvaluationConfig(server="http://localhost:1", dtype="float32"))


def test_presets_name_flags_and_values_that_pass():
    names = {f.name for f in fields(TrainConfig)}
    for preset, values in PRESETS.items():
        assert values.keys() <= names
        config = parse_config(["--preset", preset])
        assert all(getattr(config, name) == value for name, value in values.items())


def test_departures_are_what_differs_from_the_preset():
    assert departures(parse_config([]), PRESETS) == ""
    assert departures(parse_config(["--seed", "7", "--tau_clip", "0.05"]), PRESETS) == "--tau_clip 0.05 --seed 7"
    assert departures(parse_config(["--model", "a/b", "--top_k", "0"]), PRESETS) == "--model a/b --top_k 0"
