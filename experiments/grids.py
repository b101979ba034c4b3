"""The grids of the study: rows of train.py's options that differ in one thing each."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grid:
    """Options are flags of train.py, without the dashes; a row's come on top of the common ones."""

    common: dict[str, object]
    seeds: list[int]
    rows: dict[str, dict[str, object]]
    baseline: str = "OPSD"
    contrasts: list[tuple[str, str]] = field(default_factory=list)  # (row, row) pairs to compare besides the baseline

    def options(self, row: str) -> dict[str, object]:
        return {**self.common, **self.rows[row]}


def schedule(name: str, **more: object) -> dict[str, object]:
    return {"method": "pwopsd", "schedule": name, **more}


METHODS = {
    "OPSD": {"method": "opsd"},
    "EOPD": {"method": "eopd"},
    "REOPOLD": {"method": "reopold", "switch_step": 4},  # that paper switches its mask after a third of its steps
    "PW-OPSD Moderate": {"method": "pwopsd"},
}
# Table 6: weights (uniform, Moderate) x reduction (over tokens, per sequence); the other two cells stand above.
POSITION = {
    "uniform, per sequence": {"method": "opsd", "reduction": "sequence_mean"},
    "Moderate, over tokens": {"method": "pwopsd", "reduction": "token_mean"},
    "Mild": schedule("mild"),
    "Sharp": schedule("sharp"),
    "Aggressive": schedule("aggressive"),
    "reversed Moderate": schedule("reversed"),
    "Moderate, shuffled": {"method": "shuffled"},  # the same weights, at random places of each sequence
    "linear up": schedule("linear_up"),
    "linear down": schedule("linear_down"),
    "prefix": schedule("prefix"),
    "suffix": schedule("suffix"),
}
SCORES = {
    "skip": {"method": "skip"},
    "IW-OPD": {"method": "iw_opd"},
    "DASH": {"method": "dash"},
    "SCGate": {"method": "scgate"},
    "TIP": {"method": "tip"},
}
CLIPS = {
    "no clip": {"method": "opsd", "tau_clip": "inf"},
    "entry clip .2": {"method": "opsd", "tau_clip": 0.2},
    "entry clip .05": {"method": "opsd", "tau_clip": 0.05},
    **{f"token clip {tau}": {"method": "token_clip", "tau_clip": tau} for tau in (1.0, 0.2, 0.05)},
    **{f"scaled clip {tau}": {"method": "scaled_clip", "tau_clip": tau} for tau in (1.0, 0.2, 0.05)},
    "Moderate, entry clip .05": {"method": "pwopsd", "tau_clip": 0.05},
}
TEACHERS = {
    "EMA teacher": {"method": "opsd", "teacher": "ema", "ema_decay": 0.9},  # .99 would hardly move in so short a run
    "live teacher": {"method": "opsd", "teacher": "live"},
    "another's reference": {"method": "opsd", "reference": "other"},
    "no reference": {"method": "opsd", "reference": "none"},
    "answer alone": {"method": "opsd", "reference": "answer"},
}
