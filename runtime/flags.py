"""Flags and errors: what the three scripts share between the command line and their first line of work."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import MISSING, field, fields

from transformers import HfArgumentParser

from problems import InputError


def option(default: object, text: str, group: str = "run", parse: Callable | None = None) -> object:
    """A field of a script's dataclass: its default, its line and its group in --help, and how its text is read."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text, "group": group, "parse": parse})


class FlagParser(HfArgumentParser):
    """Flags from a dataclass, in the groups that its fields name; a wrong one is an InputError instead of a page."""

    def __init__(self, config_class: type, description: str | None) -> None:
        self._group_of_name: dict[str, argparse._ArgumentGroup] = {}
        super().__init__(config_class, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names: str, group: str | None = None, parse: Callable | None = None, **settings):
        """The field's metadata arrive here, its group and its parser among them; fields of loss.py name no group."""
        if parse is not None:
            settings["type"] = parse
        if names[0] == "-h":
            return super().add_argument(*names, **settings)
        name = group or "loss"
        if name not in self._group_of_name:
            self._group_of_name[name] = self.add_argument_group(name)
        return self._group_of_name[name].add_argument(*names, **settings)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")

    def parse(self, presets: dict[str, dict] | None = None, arguments: list[str] | None = None) -> object:
        """Flags over `--preset` over the dataclass's defaults; `tiny` is the preset of the embedded model."""
        given = self.parse_args(arguments)  # calls error() for a flag that does not exist
        preset = getattr(given, "preset", None) or ("tiny" if presets and given.model == "tiny" else None)
        if preset is not None:
            if preset not in presets:
                raise InputError(f"--preset {preset}: choose one of {', '.join(presets)}")
            self.set_defaults(**presets[preset], preset=preset)
        return self.parse_args_into_dataclasses(arguments)[0]


def departures(config: object, presets: dict[str, dict]) -> str:
    """What a run's options differ in from its preset (or, without one, from the defaults), as flags."""
    preset = getattr(config, "preset", None)
    base = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(config)}
    base |= {**presets.get(preset, {}), "preset": preset}
    words = [f"--{f.name} {getattr(config, f.name)}" for f in fields(config) if getattr(config, f.name) != base[f.name]]
    return " ".join(words)


def run_script(main: Callable[[], None]) -> None:
    """`main` for the shell: a mistake of the user's, or a run that cannot go on, becomes one line and status 1."""
    try:
        main()
    except (InputError, FloatingPointError, OSError) as error:  # OSError: a full disk under the logs, say
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; what is finished is on the disk, and the same command (train.py: --resume) goes on")


def listen_for_sigterm() -> list[int]:
    """A list that SIGTERM adds to, so that the step under way can finish; asked twice, it stops at once."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    signal.signal(signal.SIGTERM, note)
    return asked
