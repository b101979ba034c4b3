"""The user's mistakes, and the words for them."""


class InputError(ValueError):
    """A mistake of the user's: the scripts print it as one line and exit with status 1."""


def require(is_fine: bool, flag: str, value: object, what: str) -> None:
    """Raise InputError, naming the flag, unless its value is fine; `what` it must do or be."""
    if not is_fine:
        raise InputError(f"--{flag} {value}: must {what}")


def one_line(error: object) -> str:
    """What an exception or a reply says, on one line; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def some(names: list[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
