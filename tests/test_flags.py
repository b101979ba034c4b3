"""Flags: a wrong value names the flag that was typed; --help keeps its form; presets and departures from them."""

import sys
from dataclasses import fields

import pytest

import diagnose
import evaluate
import train
from errors import InputError
from evaluate import EvaluationConfig
from runtime.flags import FlagParser, departures
from train import PRESETS, TrainConfig, parse_config

# One value out of range for each flag whose value is checked before anything is loaded.
WRONG = {
    TrainConfig: {
        "preset": "qwen", "method": "dpo", "teacher": "frozen", "ema_decay": "1.5",
        "prompts": "nowhere.json", "chat_template_kwargs": "[1]", "max_length": "0", "eval_steps": "-1",
        "max_new_tokens": "0", "temperature": "-1", "top_p": "0", "top_k": "-1", "num_steps": "0",
        "batch_size": "0", "micro_batch_size": "0", "learning_rate": "nan", "max_grad_norm": "0", "lora_rank": "-1",
        "lora_alpha": "inf", "lora_dropout": "1", "seed": "-1", "save_steps": "0", "distill_temperature": "0",
        "tau_clip": "-1", "beta": "2", "schedule": "steep", "w_min": "2", "tau": "nan", "s": "0", "reduction": "sum",
    },
    EvaluationConfig: {
        "adapter": "nowhere", "num_samples": "0", "seeds": "-1", "temperature": "-1", "top_p": "1.1", "top_k": "-1",
        "max_new_tokens": "0", "batch_size": "0", "device": "abacus", "limit": "0", "chat_template_kwargs": "[1]",
    },
}  # fmt: skip
CASES = [(config, flag, value) for config, wrong in WRONG.items() for flag, value in wrong.items()]


def parse(config: type, *arguments: str) -> object:
    """Flags as the script takes them, with its checks."""
    if config is TrainConfig:
        return parse_config(list(arguments))
    parsed = FlagParser(config, None).parse(arguments=list(arguments))
    evaluate.check_config(parsed)
    return parsed


@pytest.mark.parametrize(("config", "flag", "value"), CASES, ids=[f"{c.__name__}-{flag}" for c, flag, _ in CASES])
def test_a_wrong_value_names_the_flag_that_was_typed(config, flag, value, tmp_path, monkeypatch):
    with pytest.raises(InputError) as caught:
        if flag == "device":  # met where the ranks start
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "argv", ["evaluate.py", f"--{flag}={value}"])
            evaluate.main()
        parse(config, f"--{flag}={value}")
    message = str(caught.value)
    assert message.startswith(f"--{flag}") and "\n" not in message
    assert value in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TrainConfig, ["--num_steps", "many"]),
        (TrainConfig, ["--micro_batch_size", "half"]),
        (TrainConfig, ["--resume", "perhaps"]),
        (TrainConfig, ["--batch", "8"]),
        (TrainConfig, ["--clip", "0.05"]),
        (TrainConfig, ["--rollout_temperature", "1.0"]),
        (EvaluationConfig, ["--seeds", "zero"]),
        (EvaluationConfig, ["--no_such_flag"]),
    ],
)
def test_what_is_no_flag_or_no_number_is_one_line(config, words):
    with pytest.raises(InputError, match=words[0]) as caught:
        parse(config, *words)
    assert "\n" not in str(caught.value) and "--help" in str(caught.value)


@pytest.mark.parametrize(("module", "config"), [(train, TrainConfig), (evaluate, EvaluationConfig)])
def test_help_has_the_docstring_and_every_flag(module, config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    text = capsys.readouterr().out
    assert module.__doc__.strip() in text and all(f"  --{f.name} " in text for f in fields(config))


@pytest.mark.parametrize(
    ("words", "with_"),
    [
        ("--method eopd --tau_clip 0.2", "--method opsd or pwopsd"),
        ("--method reopold --beta 1.0", "--method opsd or pwopsd"),
        ("--switch_step 3", "--method reopold"),
        ("--ema_decay 0.5", "--teacher ema"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(words, with_):
    with pytest.raises(InputError, match=f"{' '.join(words.split()[-2:])}: counts only with {with_}"):
        parse_config(words.split())


def test_only_what_changes_no_number_may_change_on_resume():
    free = {"output_dir", "device"}
    training = {"resume", "micro_batch_size", "gradient_checkpointing", "save_steps", "server", "shard"}
    assert free | training == train.FREE_ON_RESUME
    assert free | {"num_samples", "seeds", "batch_size", "grader"} == evaluate.FREE_ON_RESUME
    assert free | {"resume", "server", "batch_size"} == diagnose.FREE_ON_RESUME


def test_presets_name_flags_and_values_that_pass():
    names = {f.name for f in fields(TrainConfig)}
    for preset, values in PRESETS.items():
        assert values.keys() <= names
        config = parse_config(["--preset", preset])
        assert all(getattr(config, name) == value for name, value in values.items())


def test_departures_are_what_differs_from_the_preset():
    assert departures(parse_config([]), PRESETS) == ""
    assert departures(parse_config(["--tau_clip", "0.05", "--seed", "7"]), PRESETS).split() == [
        "--tau_clip", "0.05", "--seed", "7",
    ]  # fmt: skip
    assert departures(parse_config(["--model", "a/b", "--top_k", "0"]), PRESETS) == "--model a/b --top_k 0"


def test_a_number_that_would_fill_the_memory_is_refused():
    for config, flag in ((TrainConfig, "--batch_size"), (EvaluationConfig, "--num_samples")):
        with pytest.raises(InputError, match=f"{flag} 1000000000000: must lie in"):
            parse(config, flag, "1000000000000")
