"""Recipes: how a compressed model is trained, stage by stage; files beside the search spaces, found by name or path."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from autocomp.config.files import validated
from autocomp.config.named import read_named
from autocomp.config.shipped import shipped_files
from autocomp.errors import UsageError, shown

FORMAT_VERSION = 1
FOLDER = "recipes"
DEFAULT = "default"
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
# What is tried of a weight that a recipe leaves open, and what it is where nothing can be tried; chosen by hand, not measured.
FOUND: Mapping[str, tuple[float, ...]] = {"labels": (0.0, 0.5, 2.0), "features": (0.0, 0.5), "attention": (0.0, 0.5)}
UNTRIED: Mapping[str, float] = {"labels": 0.5, "features": 0.0, "attention": 0.0}


class Phase(BaseModel):
    """One stage of a recipe: what is learnt from, and for how much of the budget."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(description="what the report calls it")
    share: float = Field(1.0, gt=0.0, le=1.0, description="of the budget; the shares of all stages are 1 together")
    logits: Weight = Field(
        1.0, description="weight of the divergence from the uncompressed model's answers, T² KL for classes"
    )
    labels: Weight | None = Field(
        0.5, description="weight of Task.loss, where the task has labels; null: found by short trainings"
    )
    features: Weight | None = Field(
        0.0,
        description="weight of the squared error of layers' outputs, in the channels that were kept; null: found by short trainings",
    )
    attention: Weight | None = Field(
        0.0,
        description="weight of the divergence of attention maps, each the mean over heads; null: found by short trainings",
    )
    temperature: Literal["constant", "cosine", "entropy"] = Field(
        "cosine",
        description="constant (hot), cosine (hot to cold), or entropy: hotter where the uncompressed model is surer",
    )
    hot: float = Field(4.0, ge=1.0, le=100.0, description="the highest temperature")
    cold: float = Field(1.0, ge=1.0, le=100.0, description="the lowest temperature")
    rounding: bool = Field(
        True,
        description="train in the precisions of the candidate; false: its shapes in floats, scales found anew after",
    )
    channels: Literal["chosen", "refreshed"] = Field(
        "chosen",
        description="chosen: those that compression kept; refreshed: all of them at first, fewer and fewer, those of the largest feature maps, "
        "for the first stages, in floats (rounding: false)",
    )
    sparsity: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of single weights that are masked: for size, no kernel skips them"
    )
    masks: Literal["once", "cubic", "dynamic"] = Field(
        "once",
        description="once: the smallest, at the stage's begin; cubic: more and more of them; dynamic: as once, and they move to where "
        "gradients are small",
    )
    together: bool = Field(
        True, description="whether the smallest weights are those of all layers together, or of each by itself"
    )

    @property
    def weights(self) -> dict[str, float | None]:
        """By what is learnt from; None: to be found."""
        return {
            "logits": self.logits,
            "labels": self.labels,
            "features": self.features,
            "attention": self.attention,
        }


class Recipe(BaseModel):
    """How to train a compressed model; what a file in ``recipes/`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[1]
    name: str = Field("", description="what records call it; the name or path that it was asked for by, unless given")
    description: str = Field("", description="a line for `autocomp recipes`")
    stages: list[Phase] = Field(min_length=1, max_length=16, description="one after the other")
    learning_rate: float | None = Field(None, gt=0.0, le=1.0, description="the highest; searched unless given")
    learning_rates: tuple[float, float] = Field(
        (1e-6, 1e-2), description="the range that is searched, where no rate is given"
    )
    schedule: Literal["one-cycle", "cosine", "constant"] = Field("one-cycle", description="of the learning rate")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="of AdamW")
    clip: float = Field(1.0, gt=0.0, le=1e6, description="largest norm of all gradients together")
    ema: float = Field(0.0, ge=0.0, lt=1.0, description="decay of the moving average of weights; 0: the last weights")
    autocast: Literal["off", "bf16", "fp16"] = Field(
        "off",
        description="bf16, fp16: float layers multiply in 16 bits (fp16 with gradients scaled); norms, softmax, stored layers, and those that a "
        "probe finds sensitive, stay in fp32",
    )

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        total = sum(stage.share for stage in self.stages)
        if abs(total - 1.0) > 1e-3:
            raise ValueError(f"the shares of the stages must be 1 together, got {total:g}")
        low, high = self.learning_rates
        if not 0 < low < high <= 1:
            raise ValueError(f"learning_rates must be two rates, the lower first, up to 1; got {low:g} and {high:g}")
        wide = [stage.channels == "refreshed" for stage in self.stages]
        if any(later and not before for before, later in itertools.pairwise(wide)) or all(wide):
            raise ValueError(
                "channels are refreshed in the first stages, and the last one trains what is left: channels: chosen"
            )
        for stage in self.stages:
            if stage.channels == "refreshed" and stage.rounding:
                raise ValueError(f"stage {shown(stage.name)}: channels are refreshed in floats: rounding: false")
            if not any(weight or weight is None for weight in stage.weights.values()):
                raise ValueError(f"stage {shown(stage.name)} learns from nothing: give one of its weights a value")
            if stage.cold > stage.hot:
                raise ValueError(
                    f"stage {shown(stage.name)}: cold ({stage.cold:g}) must not be above hot ({stage.hot:g})"
                )
        return self

    @property
    def left_open(self) -> set[str]:
        """The weights that are to be found."""
        return {name for stage in self.stages for name, weight in stage.weights.items() if weight is None}

    def weighed(self, found: Mapping[str, float]) -> Recipe:
        """This recipe with the weights that it leaves open as they were ``found``, else as they are where nothing can be tried."""
        known = {**UNTRIED, **found}
        stages = [
            stage.model_copy(update={name: known[name] for name, weight in stage.weights.items() if weight is None})
            for stage in self.stages
        ]
        return self.model_copy(update={"stages": stages})

    def learns_from(self, *names: str) -> bool:
        """Whether any of these has a weight in any stage, or may get one."""
        return any(stage.weights[name] != 0 for stage in self.stages for name in names)

    @property
    def refreshes(self) -> float:
        """The share of the training in which channels are chosen anew."""
        return sum(stage.share for stage in self.stages if stage.channels == "refreshed")

    def on_chosen_channels(self) -> Recipe:
        """This recipe without the stages in which channels are chosen: what goes on from weights that have their channels."""
        stages = [stage for stage in self.stages if stage.channels == "chosen"]
        whole = sum(stage.share for stage in stages)
        return self.model_copy(update={"stages": [s.model_copy(update={"share": s.share / whole}) for s in stages]})

    @property
    def masked(self) -> bool:
        """Whether single weights are masked, which no kernel skips."""
        return any(stage.sparsity for stage in self.stages)

    @property
    def rounds_last(self) -> bool:
        """Whether the last stage trains what is delivered."""
        return self.stages[-1].rounding


def list_recipes() -> list[str]:
    """Return the names of the recipes that ship with autocomp."""
    return list(shipped_files(FOLDER))


def load_recipe(name: str | Path = DEFAULT) -> Recipe:
    """Read a recipe by shipped name or path. UsageError names the file, the key, the rule and the value."""
    path, data = read_named(FOLDER, name, "recipe", "stages", FORMAT_VERSION)
    recipe = validated(Recipe, data, f"{path}: ")
    if not recipe.rounds_last:
        raise UsageError(f"{path}: the last stage must train what is delivered: leave out its rounding: false")
    return recipe.model_copy(update={"name": recipe.name or str(name)})
