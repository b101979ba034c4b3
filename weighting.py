"""Where in a solution a token counts: Eq. (5), its named schedules, and the controls it is compared with.

A schedule is a function of the relative position r in (0, 1) alone. To add one, add a line to SCHEDULES: every
script then knows it by name. Pure functions of tensors; axes: M valid tokens of a batch, row after row.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from errors import InputError, require

Schedule = Callable[[Tensor], Tensor]  # r_M -> w_M


def relative_position(lengths: list[int]) -> Tensor:
    """Eq. (5): r_{i,t} = (t - 0.5) / L_i, t = 1..L_i, over the row's own valid length (EOS counts); [M] float32."""
    return torch.cat([(torch.arange(1, length + 1) - 0.5) / length for length in lengths])


def position_weight(r: Tensor, w_min: float, tau: float, s: float) -> Tensor:
    """Eq. (5): w = w_min + (1 - w_min) * sigmoid((r - tau) / s). Not normalised: Moderate averages 0.77."""
    return w_min + (1.0 - w_min) * torch.sigmoid((r - tau) / s)


# Paper Section 3.3 and Table 2: (w_min, tau, s). Moderate is the default, chosen before any result.
SIGMOIDS: dict[str, tuple[float, float, float]] = {
    "mild": (0.50, 0.20, 0.20),
    "moderate": (0.25, 0.30, 0.10),
    "sharp": (0.10, 0.40, 0.05),
    "aggressive": (0.05, 0.50, 0.05),
}
SCHEDULES: dict[str, Schedule] = {
    "uniform": torch.ones_like,
    **{name: partial(position_weight, w_min=w_min, tau=tau, s=s) for name, (w_min, tau, s) in SIGMOIDS.items()},
    # Controls, not in the paper; each lies between Moderate's w_min and 1.
    "reversed": lambda r: position_weight(1.0 - r, *SIGMOIDS["moderate"]),
    "linear_up": lambda r: 0.25 + 0.75 * r,
    "linear_down": lambda r: 1.0 - 0.75 * r,
}


def get_schedule(name: str, **given: float | None) -> Schedule:
    """A schedule by name; w_min, tau and s, where they are given, replace single values of an Eq. (5) schedule.

    Raises InputError for an unknown name, or values out of range (0 <= w_min <= 1, -10 <= tau <= 10, s >= 1e-6).
    """
    require(name in SCHEDULES, "schedule", name, f"be one of {', '.join(SCHEDULES)}")
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return SCHEDULES[name]
    if name not in SIGMOIDS:
        raise InputError(f"--w_min, --tau, --s: the schedule {name} has none; those that do: {', '.join(SIGMOIDS)}")
    # r runs from 0 to 1; below the least s, (r - tau) / s would be 0 / 0 in float32 at r = tau.
    for key, low, high in (("w_min", 0.0, 1.0), ("tau", -10.0, 10.0), ("s", 1e-6, 1e6)):
        if key in given:
            require(low <= given[key] <= high, key, given[key], f"lie in [{low:g}, {high:g}]")
    return partial(SCHEDULES[name], **given)
