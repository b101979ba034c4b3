"""The grids of the study: rows of train.py's options that differ in one thing each."""

from dataclasses import dataclass, field, replace

from errors import InputError

BEFORE = "before training"  # the row of the untrained model; a contrast may name it


@dataclass(frozen=True)
class Grid:
    """Options are flags of train.py, without the dashes; a row's come on top of the common ones.

    Rows are compared with the baseline, and in the pairs of `contrasts`. Raises InputError for a row that is not there.
    """

    common: dict[str, object]
    seeds: list[int]
    rows: dict[str, dict[str, object]]
    baseline: str = "OPSD"
    contrasts: tuple[tuple[str, str], ...] = ()
    facts: dict[str, object] = field(default_factory=dict)  # that each of its cells carries

    def __post_init__(self) -> None:
        missing = {self.baseline, *(row for pair in self.contrasts for row in pair)} - {*self.rows, BEFORE}
        if missing:
            raise InputError(f"a grid without a row named {', '.join(sorted(missing))}")

    def options(self, row: str) -> dict[str, object]:
        return {**self.common, **self.rows[row]}


TAUS = {"1.0": 1.0, ".2": 0.2, ".05": 0.05}
ROWS = {
    "OPSD": {"method": "opsd"},
    "EOPD": {"method": "eopd"},
    "REOPOLD": {"method": "reopold", "switch_step": 4},  # that paper switches its mask after a third of its steps
    "PW-OPSD Moderate": {"method": "pwopsd"},
    # Table 6: weights (uniform, Moderate) x reduction (over tokens, per sequence); the other two cells stand above.
    "uniform, per sequence": {"method": "opsd", "reduction": "sequence_mean"},
    "Moderate, over tokens": {"method": "pwopsd", "reduction": "token_mean"},
    "Mild": {"method": "pwopsd", "schedule": "mild"},
    "Sharp": {"method": "pwopsd", "schedule": "sharp"},
    "Aggressive": {"method": "pwopsd", "schedule": "aggressive"},
    "reversed Moderate": {"method": "pwopsd", "schedule": "reversed"},
    "Moderate, shuffled": {"method": "shuffled"},  # the same weights, at random places of each sequence
    "linear up": {"method": "pwopsd", "schedule": "linear_up"},
    "linear down": {"method": "pwopsd", "schedule": "linear_down"},
    "prefix": {"method": "prefix"}, "suffix": {"method": "suffix"},
    "skip": {"method": "skip"}, "IW-OPD": {"method": "iw_opd"}, "DASH": {"method": "dash"},
    "SCGate": {"method": "scgate"}, "TIP": {"method": "tip"},
    "no clip": {"method": "opsd", "tau_clip": "inf"},
    "entry clip .2": {"method": "opsd", "tau_clip": 0.2},
    "entry clip .05": {"method": "opsd", "tau_clip": 0.05},
    **{f"token clip {name}": {"method": "opsd_token_clip", "tau_clip": tau} for name, tau in TAUS.items()},
    **{f"scaled clip {name}": {"method": "opsd_scaled_clip", "tau_clip": tau} for name, tau in TAUS.items()},
    "Moderate, entry clip .05": {"method": "pwopsd", "tau_clip": 0.05},
    "EMA teacher": {"method": "opsd", "teacher": "ema", "ema_decay": 0.9},  # .99 would hardly move in so short a run
    "live teacher": {"method": "opsd", "teacher": "live"},
    "another's reference": {"method": "opsd", "reference": "other"},
    "no reference": {"method": "opsd", "reference": "none"},
    "answer alone": {"method": "opsd", "reference": "answer"},
}  # fmt: skip


def named(*names: str) -> dict[str, dict[str, object]]:
    return {name: ROWS[name] for name in names}


EMBEDDED = Grid(
    # Short of the ceiling on purpose: after 20 steps at 1e-3 nearly all is right, and rows could not be told apart.
    common={"num_steps": 12, "learning_rate": 5e-4},
    seeds=[0, 1, 2, 3, 4, 5],
    rows=ROWS,
    contrasts=(
        ("PW-OPSD Moderate", "reversed Moderate"), ("PW-OPSD Moderate", "Moderate, shuffled"),
        ("PW-OPSD Moderate", "uniform, per sequence"), ("PW-OPSD Moderate", "Moderate, over tokens"),
        ("linear up", "linear down"), ("suffix", "prefix"), ("token clip .05", "entry clip .05"),
        ("scaled clip .05", "entry clip .05"), ("scaled clip 1.0", "no clip"), ("EOPD", "no clip"),
        ("entry clip .05", BEFORE), ("reversed Moderate", "uniform, per sequence"),
        ("another's reference", "no reference"),
    ),
)  # fmt: skip


# Worlds in which the teacher misleads (worlds.py): by a leap where the student cannot follow, by its order.
def other_world(name: str) -> dict[str, object]:
    """Options of a run in a world that `make_world` wrote to runs/worlds/NAME."""
    folder = f"runs/worlds/{name}"
    data = {"data": f"{folder}/train.jsonl", "eval_data": f"{folder}/heldout.jsonl"}
    return {"preset": "tiny", "model": f"{folder}/model", **data, "max_new_tokens": 128}


FITTED = {"w_min": 0.331, "tau": 0.42, "s": 0.126}  # Eq. (5) fitted to the teacher's viability (docs/diagnostic.md)
LEAP = Grid(
    common={**other_world("leap-0.4"), "num_steps": 20, "learning_rate": 3e-4},
    seeds=[0, 1, 2, 3, 4, 5],
    rows={
        **named("OPSD", "reversed Moderate", "Moderate, shuffled", "PW-OPSD Moderate", "Sharp", "Aggressive", "suffix"),
        **named("IW-OPD", "Mild", "uniform, per sequence", "Moderate, over tokens", "prefix", "DASH"),
        **named("another's reference", "no reference"),
        "fitted by the diagnostic": {"method": "pwopsd", **FITTED},
        "fitted, w_min 0": {"method": "pwopsd", **FITTED, "w_min": 0.0},  # is it the floor that the fit has too high,
        "fitted, tau .5": {"method": "pwopsd", **FITTED, "tau": 0.5, "s": 0.05},  # or the rise that comes too early?
        **named("entry clip .2", "entry clip .05", "token clip .05", "scaled clip .05"),
        "Moderate, entry clip .2": {"method": "pwopsd", "tau_clip": 0.2},
        **named("Moderate, entry clip .05"),
        "Aggressive, entry clip .05": {**ROWS["Aggressive"], "tau_clip": 0.05},
    },
    contrasts=(
        ("PW-OPSD Moderate", "reversed Moderate"), ("PW-OPSD Moderate", "Moderate, shuffled"),
        ("PW-OPSD Moderate", "Mild"), ("Sharp", "PW-OPSD Moderate"), ("Aggressive", "Sharp"), ("suffix", "Aggressive"),
        ("prefix", "reversed Moderate"), ("PW-OPSD Moderate", "uniform, per sequence"),
        ("reversed Moderate", "uniform, per sequence"), ("Aggressive", "uniform, per sequence"),
        ("Moderate, over tokens", "PW-OPSD Moderate"), ("another's reference", "no reference"),
        ("fitted, w_min 0", "Sharp"), ("fitted, w_min 0", "fitted by the diagnostic"),
        ("fitted, tau .5", "fitted by the diagnostic"), ("fitted by the diagnostic", "PW-OPSD Moderate"),
        ("Aggressive", "entry clip .05"), ("token clip .05", "entry clip .05"), ("scaled clip .05", "entry clip .05"),
        ("entry clip .2", "entry clip .05"), ("entry clip .2", "token clip .05"),
        ("Moderate, entry clip .2", "entry clip .2"), ("Moderate, entry clip .05", "entry clip .05"),
        ("Aggressive, entry clip .05", "entry clip .05"),
    ),
)  # fmt: skip


def schedules_in(world: str) -> Grid:
    """The first question of the leap world, the order of the schedules, in another world."""
    rows = named("OPSD", "reversed Moderate", "PW-OPSD Moderate", "Aggressive")
    contrasts = (("PW-OPSD Moderate", "reversed Moderate"), ("Aggressive", "PW-OPSD Moderate"))
    return replace(LEAP, common={**LEAP.common, **other_world(world)}, rows=rows, contrasts=contrasts)


LONG = {"num_steps": 80, "eval_steps": 20}
LEAP_LONG = replace(LEAP, common={**LEAP.common, **LONG})  # what lasts of it, along four times as many steps

GRIDS = {"embedded": EMBEDDED, "leap": LEAP, "leap-long": LEAP_LONG}
GRIDS |= {world: schedules_in(world) for world in ("leap-0.2", "leap-0.1", "leak")}
