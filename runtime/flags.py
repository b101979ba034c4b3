"""Flags and errors: what the three scripts share between the command line and their first line of work."""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import field, fields
from math import inf

from transformers import HfArgumentParser

from errors import InputError, require


def option(default: object, text: str, group: str = "run", **limits: object) -> object:
    """A field of a script's dataclass: its default, its line and group in --help, its limits."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text, "group": group, "limits": limits})


class FlagParser(HfArgumentParser):
    """Flags from a dataclass, in the groups that its fields name; a wrong one is an InputError instead of a page."""

    def __init__(self, config_class: type, description: str | None) -> None:
        self._group_of_name: dict[str, argparse._ArgumentGroup] = {}
        how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(config_class, description=description, **how)

    def add_argument(self, *names: str, group: str = "loss", limits=None, **settings):
        """The field's metadata arrive here, its group among them; fields of loss.py name none."""
        if names[0] == "-h":
            return super().add_argument(*names, **settings)
        if group not in self._group_of_name:
            self._group_of_name[group] = self.add_argument_group(group)
        return self._group_of_name[group].add_argument(*names, **settings)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")

    def parse(self, presets: dict[str, dict] | None = None, arguments: list[str] | None = None) -> object:
        """Flags over `--preset` over the dataclass's defaults; `tiny` is the preset of the embedded model."""
        given = self.parse_args(arguments)  # calls error() for a flag that does not exist
        preset = getattr(given, "preset", None) or ("tiny" if presets and given.model == "tiny" else None)
        if preset is not None:
            require(preset in presets, "preset", preset, f"be one of {', '.join(presets)}")
            self.set_defaults(**presets[preset], preset=preset)
        config = self.parse_args_into_dataclasses(arguments)[0]
        if getattr(config, "resume", False) and config.output_dir is None:
            raise InputError("--resume needs --output_dir, the run to go on with")
        for f in fields(config):
            values = getattr(config, f.name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and "limits" in f.metadata:
                    check_limits(f.name, value, **f.metadata["limits"])
        return config


def check_limits(name: str, value: object, least=None, positive=False, within=None) -> None:
    """Raise InputError, naming the flag, for a value beyond the limits of its `option`."""
    require(least is None or value >= least, name, value, f"be at least {least}")
    require(not positive or 0.0 < value < inf, name, value, "be positive and finite")
    if within is not None:
        require(within[0] <= value <= within[1], name, value, f"lie in [{within[0]:g}, {within[1]:g}]")


def departures(config: object, presets: dict[str, dict]) -> str:
    """What a run's options differ in from its preset (or, without one, from the defaults), as flags."""
    base = vars(type(config)()) | presets.get(config.preset, {}) | {"preset": config.preset}
    return " ".join(f"--{name} {value}" for name, value in vars(config).items() if value != base[name])


def run_script(main: Callable[[], int | None]) -> None:
    """`main` for the shell, its result the exit status; what a user can do something about is one line and 1.

    Ctrl-C is one line and 130. Any other exception ends with Python's traceback: it belongs into a report.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; what was written stays; the same command goes on (train, diagnose: --resume)", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of `| head`, say
        sys.exit("error: nobody reads the output any more; what was written stays; --resume goes on, evaluate without")
    except Exception as error:
        if line := describe(error):
            sys.exit(f"error: {line}")
        raise


OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def describe(error: Exception) -> str | None:
    """A user's mistake, numbers that overflow, a fault of a disk or a lack of memory in one line; else None."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text)):
        return f"out of memory ({text[:200]}); what helps: lower --max_new_tokens, --batch_size, --micro_batch_size"
    return text if isinstance(error, (InputError, FloatingPointError, OSError)) else None
