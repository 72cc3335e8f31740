"""Search-space files: what they may say, where they are found, and how one is read."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from autocomp.config.named import read_named
from autocomp.config.shipped import shipped_files
from autocomp.errors import UsageError, cut, shown, suggest
from autocomp.records.precisions import Precision

FORMAT_VERSION = 1

Share = Annotated[float, Field(gt=0.0, le=1.0, strict=True)]


class Rule(BaseModel):
    """Options of the layers named; a missing key says nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: str | list[str] = Field(
        description="names of layers, `*` for any part of one, as `autocomp check` shows them"
    )
    keep: list[Share] | None = Field(
        None, description="shares of a channel group that may be kept, rounded to whole vectors"
    )
    ranks: list[Share] | None = Field(None, description="shares of a layer's full rank, of SVD and Tucker-2")
    spatial_ranks: list[Share] | None = Field(
        None, description="the same of a column and a row kernel in place of a square one"
    )
    precisions: list[Precision] | None = Field(None, description="what weights and activations may be stored in")
    depth: bool | None = Field(
        None,
        description="whether a branch that has a way around it (a residual branch, a gate) may be left out whole, a constant in its place",
    )

    @field_validator("keep", "ranks", "spatial_ranks", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """YAML reads ``1`` as an integer, which is fine, and ``5e-1`` as a text, which is not."""
        if not isinstance(value, list):
            return value
        for item in value:
            if isinstance(item, str):
                raise ValueError(f"{shown(item)} is a text; write the number with a point and without quotes, as 0.5")
        return [float(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value]

    def globs(self) -> list[str]:
        return [self.layers] if isinstance(self.layers, str) else self.layers

    def matches(self, layer: str) -> bool:
        return any(fnmatchcase(layer, glob) for glob in self.globs())


class SpaceFile(BaseModel):
    """A search-space file: what may be done to which layers.

    Equalising (``compress.equalise``) and turning (``compress.rotate``) leave the function as it is. Approximate groups are those of
    ``groups.Group``. Norms, softmax and everything else that is no convolution or linear layer stays in fp32 whatever the file says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1]
    description: str = Field("", description="a line for `autocomp spaces`")
    rules: list[Rule] = Field(description="in order: later ones override earlier ones, key by key")
    step: int | None = Field(
        None,
        ge=1,
        le=64,
        description="channels that widths are multiples of; whole vectors unless given. Fewer than a vector save the readers' work alone",
    )
    protect: list[str] = Field(
        [], description="layers that stay in fp32 at full rank and keep all their output channels"
    )
    ends: Literal["any", "8bit", "float"] = Field(
        "8bit",
        description="the least that the first and the last layer, the most sensitive, may be stored and computed in; float: fp16; any: no limit",
    )
    kernels_only: bool = Field(
        False, description="offer only precisions that every profile computes in; else the others too, for their size"
    )
    refine: bool = Field(
        False,
        description="offer widths and ranks between those of the rules too, next to what is best, once the search knows what that is",
    )
    observer: Literal["minmax", "percentile", "mse"] = Field(
        "mse", description="how the ranges of 8-bit activations are chosen"
    )
    equalise: bool = Field(False, description="first bring the channels between layers to like ranges")
    rotate: bool = Field(
        False,
        description="first turn residual streams to their principal directions, so that they can be narrowed at less cost",
    )
    approximate: bool = Field(
        False,
        description="offer widths of approximate groups beside exact ones; where there are no others, or with rotate, they are offered anyway",
    )


def list_spaces() -> list[str]:
    """Return the names of the search spaces that ship with autocomp."""
    return list(shipped_files("search_spaces"))


def load_space(name: str | Path) -> SpaceFile:
    """Read a search-space file by path or shipped name. UsageError names the file, the key, the rule and the value."""
    path, data = read_named("search_spaces", name, "search space", "rules", FORMAT_VERSION)
    try:
        return SpaceFile.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{path}: {_first_error(error)}") from error


def _first_error(error: ValidationError) -> str:
    """Say in one line what pydantic found first: the key, the rule, the value."""
    first = error.errors(include_url=False)[0]
    key = cut(".".join(map(str, first["loc"])))
    if first["type"] == "extra_forbidden":
        model = Rule if first["loc"][0] == "rules" else SpaceFile
        return f"unknown key {shown(key)}.{suggest(str(first['loc'][-1]), model.model_fields)}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    value = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    return f"{key}: {cut(first['msg'].removeprefix('Value error, '), 400)}{value}{more}"
