"""Settings of a run: flag over ``AUTOCOMP_*`` variable over file over default, validated where they enter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from autocomp.config.files import is_number, read_mapping, validated
from autocomp.config.goals import Goals as Goals
from autocomp.config.goals import Text
from autocomp.config.limits import read_family
from autocomp.config.quantities import LARGEST, parse_factor, parse_seconds, parse_training
from autocomp.config.versions import KEY, current_by_hand
from autocomp.errors import UsageError, cut, shown, suggest

FORMAT_VERSION = 1
RENAMED = {"measure": "measurements", "max_bytes": "max_size"}  # names of version 0.2 and before, still read
MOST = 10_000_000  # trials, samples, minutes: more than any run has
ENV_PREFIX = "AUTOCOMP_"
# Variables of autocomp that are no settings of a run.
ENV_RESERVED = {"AUTOCOMP_CACHE"}
# What a resumed run may change: how much more to do, and where its folder now lies.
BUDGET_KEYS = {
    "trials",
    "measurements",
    "minutes",
    "out",
    "evaluate_timeout",
    "stop_when_met",
    "recover",
    "recipe",
    "auto",
}
Automatic = Literal["space", "calibration_samples", "recover", "trials", "measurements"]  # what may be left to autocomp
AUTOMATIC: tuple[Automatic, ...] = get_args(Automatic)
TRAINED = "trained"  # the search space of a run that trains, unless another is named


def _seconds(value: Any) -> Any:
    return parse_seconds(value) if _has_unit(value) else value


def _training(value: Any) -> Any:
    """A length of training as text; a bare 0 may come as a number."""
    if value == 0 and not isinstance(value, bool):
        return "0"
    if not isinstance(value, str):
        raise ValueError(f"must be how long to train, such as 10min, 500steps or 5epochs, or 0; got {shown(value)}")
    return value.strip() if parse_training(value)[0] else "0"


def _auto(value: Any) -> Any:
    """True, false, or what was chosen, with reasons."""
    chosen = value.items() if isinstance(value, Mapping) else ()
    reasons = isinstance(value, Mapping) and all(name in AUTOMATIC and isinstance(why, str) for name, why in chosen)
    if not (isinstance(value, bool) or reasons):
        raise ValueError(f"must be true or false, got {shown(value)}")
    return value


def _has_unit(value: Any) -> bool:
    """Text that is only a number is left to the strict check, which refuses it."""
    return isinstance(value, str) and not is_number(value)


class Settings(BaseModel):
    """Everything that decides a run, resolved; what ``config.yaml`` of a run folder holds."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    task: Text | None = Field(default=None, description="a built-in task, or package.module:function")
    profiles: list[Text] = Field(
        default=["x86-host"], min_length=1, max_length=16, description="hardware profiles, names or YAML files"
    )
    space: Text = Field(default="default", description="search space, a name or a YAML file")
    trials: int = Field(default=300, ge=1, le=MOST, description="candidates told to the study")
    measurements: int = Field(default=24, ge=1, le=MOST, description="candidates compiled and timed as whole modules")
    minutes: float | None = Field(
        default=None, gt=0, le=MOST, description="minutes of the whole run, the files of its end included"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of calibration, search and sampling")
    out: Text = Field(default="runs/task", description="run folder; runs/NAME OF THE TASK unless given")
    storage: Text | None = Field(
        default=None, description="Optuna storage URL; study.journal in the run folder unless given"
    )
    sampler: Literal["autocomp", "tpe", "nsgaii", "nsgaiii", "gp", "random", "given"] = Field(
        default="autocomp", description="what proposes candidates: autocomp's engine, or a sampler of Optuna's"
    )
    calibration_samples: int = Field(default=256, ge=1, le=MOST, description="samples of the calibration data to use")
    recover: Annotated[str, BeforeValidator(_training)] = Field(
        default="0",
        description="how long to train candidates beyond the front: the whole stage (10min), or each finalist (500steps, 5epochs); 0: none",
    )
    recipe: Text = Field(default="default", description="how they are trained, a name or a YAML file")
    replay: Text | None = Field(
        default=None,
        description="a finished run whose points are made again for this task's weights, in the place of a search",
    )
    points: list[Text] = Field(
        default=[], max_length=MOST, description="ids of those points; the whole front unless given"
    )
    references: bool = Field(default=True, description="measure ONNX Runtime on the same model as reference points")
    evaluate_timeout: Annotated[float | None, BeforeValidator(_seconds)] = Field(
        default=None,
        gt=0,
        le=LARGEST,
        description="seconds that evaluate and test may take for one model each; text with a unit (90s) is read",
    )
    deterministic: bool = Field(
        default=False, description="let no time that this run measures decide what is searched: same seed, same trials"
    )
    goals: Goals = Field(default=Goals(), description="limits a candidate must meet to be feasible")
    family: Annotated[list[str], BeforeValidator(read_family)] = Field(
        default=[], max_length=16, description="speed-ups of which each gets a model of its own, such as [2x, 4x]"
    )
    stop_when_met: bool = Field(
        default=False,
        description="end the search once a measured candidate meets the goals, and each member of the family is there",
    )

    auto: Annotated[bool | dict[Automatic, Text], BeforeValidator(_auto)] = Field(
        default=False,
        description="choose space, calibration_samples, recover, trials and measurements where they are not stated; in the config.yaml of a "
        "run: those that were chosen, with the reason of each",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_out_after_task(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("task"), str) and data["task"] and "out" not in data:
            return {**data, "out": f"runs/{data['task'].rpartition(':')[2]}"}
        return data

    @model_validator(mode="before")
    @classmethod
    def _space_of_what_is_trained(cls, data: Any) -> Any:
        """What is trained afterwards may be narrower than what must be good at once."""
        if not isinstance(data, dict) or "space" in data or not isinstance(recover := data.get("recover"), str):
            return data
        try:
            trains = parse_training(recover)[0] > 0
        except ValueError:  # which its own check tells
            return data
        return {**data, "space": TRAINED} if trains else data

    @model_validator(mode="after")
    def _recovery_in_time(self) -> Settings:
        amount, unit = self.training
        if unit == "seconds" and amount and self.deterministic:
            raise ValueError("recover by the clock cannot be deterministic: give it in steps, such as 500steps")
        if unit == "seconds" and self.minutes is not None and amount >= 60 * self.minutes:
            raise ValueError(
                f"recover ({self.recover}) is a part of minutes ({self.minutes:g}): leave time to search, and to write the models"
            )
        return self

    @property
    def left(self) -> tuple[Automatic, ...]:
        """Which settings are left to autocomp, and not chosen yet."""
        return tuple(name for name in AUTOMATIC if name not in self.model_fields_set) if self.auto is True else ()

    @property
    def training(self) -> tuple[float, str]:
        """How long to train, and in what: ``seconds``, ``steps`` or ``epochs``."""
        return parse_training(self.recover)

    @model_validator(mode="after")
    def _nothing_to_choose(self) -> Settings:
        if self.auto is True and self.replay is not None:
            raise ValueError("auto chooses how to search, and a replay searches nothing: leave one of the two out")
        return self

    @model_validator(mode="after")
    def _no_clock(self) -> Settings:
        if self.deterministic and self.minutes is not None:
            raise ValueError(
                "minutes end a search by the clock, so it cannot be deterministic: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _no_early_end(self) -> Settings:
        if self.deterministic and self.stop_when_met:
            raise ValueError(
                "stop_when_met ends a search by measured times, so it cannot be deterministic: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _known_profiles(self) -> Settings:
        """A latency or energy by profile is of one that is searched for; a search that stops when goals are met has some."""
        for goal, name in self.goals.profiles_named():
            if name not in self.profiles:
                raise ValueError(
                    f"goals.{goal} names profile {shown(name)}, which is not searched for{suggest(name, self.profiles)}"
                )
        if self.stop_when_met and not (self.goals.any or self.family):
            raise ValueError("stop_when_met needs something to be met: set a goal, or a family")
        return self

    @property
    def speedups(self) -> list[float]:
        """The family's members, slow to fast."""
        return sorted(parse_factor(text) for text in self.family)

    @model_validator(mode="after")
    def _distinct_profiles(self) -> Settings:
        if len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"profiles must differ from each other, got {cut(', '.join(self.profiles))}")
        return self


# Every setting by the name it has as a variable or a flag; goals stand under their own names there.
SETTING_NAMES = (set(Settings.model_fields) - {"goals"}) | set(Goals.model_fields)


def load_settings(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None
) -> Settings:
    """Resolve settings: ``overrides`` (flags, keywords; None: not given) over environment over file over ``base`` over defaults.

    The file is YAML or TOML by its ending. Goals may be overridden under their own names (``max_drop``).

    Raises:
        UsageError: It names the file or variable, the key, the rule and the value received.

    Examples:
        >>> settings = load_settings(overrides={"task": "digits", "max_latency": "0.5ms"})
        >>> settings.out, settings.goals.max_latency
        ('runs/digits', 0.0005)
        >>> load_settings(overrides={"trails": 100})
        Traceback (most recent call last):
        autocomp.errors.UsageError: trails: there is no such key. Did you mean 'trials'? Known keys: ...
    """
    merged: dict[str, Any] = dict(base or {})
    origins = dict.fromkeys(merged, "")
    if path is not None:
        stated = _unversioned(read_mapping(Path(path)), Path(path))
        merged, origins = {**merged, **stated}, {**origins, **dict.fromkeys(stated, f"{path}: ")}
    _override(merged, _from_environment(os.environ), origins, "environment: ")
    _override(merged, {key: value for key, value in (overrides or {}).items() if value is not None}, origins, "")
    return validated(Settings, merged, origins)


def read_settings(path: Path) -> Settings:
    """Read what `dump_settings` wrote, as it stands: no variables, no flags. UsageError as `load_settings`, or if its end is missing."""
    data = read_mapping(path)
    if KEY not in data:
        raise UsageError(
            f"{path} is not whole: its last line, {KEY}: {FORMAT_VERSION}, is missing, and settings before it may be. Nothing was touched: put "
            "the whole file back"
        )
    return validated(Settings, _unversioned(data, path), f"{path}: ")


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, for editors and checkers."""
    return Settings.model_json_schema()


def dump_settings(settings: Settings) -> str:
    """Return the YAML of resolved settings; `load_settings` reads it back. The format version stands last: a file that was cut has none."""
    return yaml.safe_dump({**settings.model_dump(), KEY: FORMAT_VERSION}, sort_keys=False)


def differences(old: Settings, new: Settings) -> list[str]:
    """Return what differs between two settings in a way a resumed run may not, one ``key: old -> new`` each."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if key not in BUDGET_KEYS and before[key] != after[key]
    ]


def _unversioned(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys of a file whose version is one that is read."""
    data = current_by_hand(data, path, FORMAT_VERSION, assumed=FORMAT_VERSION)
    data = renamed({key: value for key, value in data.items() if key != KEY})
    return {**data, "goals": renamed(data["goals"])} if isinstance(data.get("goals"), dict) else data


def renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their names of today. UsageError where one is given under its old name, too."""
    for old, new in RENAMED.items():
        if old in data and new in data:
            raise UsageError(f"{old} is the old name of {new}, and both are given: leave {old} out")
    return {RENAMED.get(key, key): value for key, value in data.items()}


def _override(target: dict[str, Any], data: Mapping[str, Any], origins: dict[str, str], origin: str) -> None:
    """Lay settings over those of the file; goals may come under their own names or as a mapping."""
    data = renamed(data)
    rest = {key: value for key, value in data.items() if key not in Goals.model_fields}
    goals = {key: value for key, value in data.items() if key in Goals.model_fields}
    if isinstance(rest.get("goals"), Goals):
        goals = rest.pop("goals").model_dump() | goals
    elif isinstance(rest.get("goals"), Mapping):
        goals = renamed(rest.pop("goals")) | goals
    if goals and isinstance(target.get("goals", {}), dict):
        rest["goals"] = {**target.get("goals", {}), **goals}
    for key in goals:
        origins[f"goals.{key}"] = origin
    target.update(rest)
    origins.update(dict.fromkeys(rest.keys() - {"goals"}, origin))


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read ``AUTOCOMP_*`` variables as settings; a name near a setting's is refused, any other is left alone."""
    found: dict[str, Any] = {}
    known = {ENV_PREFIX + name.upper(): name for name in (*SETTING_NAMES, *RENAMED)}
    for variable, text in environment.items():
        if not variable.startswith(ENV_PREFIX) or variable in ENV_RESERVED:
            continue
        if variable in known:
            if text != "":
                found[known[variable]] = _typed(known[variable], text)
        elif near := suggest(variable.removeprefix(ENV_PREFIX), (name.upper() for name in SETTING_NAMES)):
            raise UsageError(f"environment: {variable} is no setting.{near} (after {ENV_PREFIX})")
    return found


def _typed(name: str, text: str) -> Any:
    """A variable is always text: give it the type of its setting where it reads as one, else leave it to be refused."""
    if name == "profiles":
        return [part.strip() for part in text.split(",") if part.strip()]
    if name in ("task", "space", "out", "storage", "sampler", "recover", "recipe", "replay"):
        return text
    if name in ("family", "points"):
        return [part.strip() for part in text.split(",") if part.strip()]
    if name in ("references", "deterministic", "stop_when_met", "auto"):
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower(), text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _flat(settings: Settings) -> dict[str, Any]:
    data = settings.model_dump()
    goals = data.pop("goals")
    return {**data, **{f"goals.{key}": value for key, value in goals.items()}}
