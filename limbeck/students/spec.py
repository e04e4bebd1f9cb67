"""What a student is made of, as data: the ``student:`` part of a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from limbeck.strict import Strict
from limbeck.students.depth import take_layers
from limbeck.students.fresh import from_config
from limbeck.students.taught import freeze_embeddings, set_dropout, token_vectors
from limbeck.students.width import narrower_sizes, shrink

LAYERS, SHRINK = "layers", "shrink"


def refuse_options(model: str | None, options: Mapping[str, Any]) -> None:
    """Options are for functions; a folder or hub id takes none.

    Raises:
        ValueError: there are some.

    Example:
        >>> refuse_options("package.module:function", {"width": 8})
    """
    if options and (model is None or ":" not in model or model.startswith("cache:")):
        raise ValueError(f"options {sorted(options)} are for a package.module:function; drop them")


class ShrinkSpec(Strict):
    """The ``shrink:`` part of a student: how much narrower than the teacher; see `limbeck.students.shrink`."""

    share: float | None = Field(None, ge=0, lt=1, description="what part of every size goes; or sizes, below")
    hidden_size: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None
    intermediate_size: int | None = None
    init: Literal["importance", "low_rank"] = "importance"

    @model_validator(mode="after")
    def _a_share_or_sizes(self) -> ShrinkSpec:
        if (self.share is None) == (not self.sizes()):
            raise ValueError("shrink needs either share, or sizes: hidden_size, heads, intermediate_size")
        return self

    def sizes(self) -> dict[str, Any]:
        """The sizes that are said."""
        return self.model_dump(exclude={"share", "init"}, exclude_none=True)

    def apply(self, model: nn.Module) -> nn.Module:
        """Make the narrower model."""
        sizes = self.sizes() if self.share is None else narrower_sizes(model, self.share)
        return shrink(model, **sizes, init=self.init)


class StudentSpec(Strict):
    """The ``student:`` part: the teacher with fewer layers or narrower, one of its kind, or another model."""

    layers: tuple[int, ...] | None = Field(None, description="layers taken from the teacher, counted from 0")
    path: str | None = Field(None, description="where the teacher keeps its layers, if it cannot be found")
    shrink: ShrinkSpec | None = Field(None, description="narrower than the teacher, from its weights")
    config: dict[str, Any] | None = Field(
        None, description="of the teacher's kind with random weights: what its config says otherwise"
    )
    model: str | None = Field(None, description="a folder, a hub id, or package.module:function")
    options: dict[str, Any] = Field(default_factory=dict, description="options of such a function")
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="of its dropout layers while it is taught; the baseline keeps its own",
    )
    freeze_embeddings: bool | Literal["auto"] = Field(
        False,
        description="its token vectors stay as they begin while it is taught; the baseline's train. auto: where "
        "they are the teacher's own, of a student that is made of its layers",
    )

    @model_validator(mode="after")
    def _one_source(self) -> StudentSpec:
        if sum((self.from_weights, self.config is not None, self.model is not None)) != 1:
            raise ValueError(
                "the student needs either layers=[...] of the teacher or a model of its own, or shrink (layers "
                "may stand beside it), or config"
            )
        if self.path is not None and self.layers is None:
            raise ValueError("path says where the teacher keeps its layers; give layers too, or drop it")
        refuse_options(self.model, self.options)
        return self

    @property
    def from_weights(self) -> bool:
        """Whether it begins with weights of the teacher."""
        return self.layers is not None or self.shrink is not None

    def made_of(self, teacher: nn.Module, seed: int) -> nn.Module:
        """Make the student of a teacher, if it is no model of its own; random weights are those of the seed.

        Raises:
            TypeError: the teacher is no transformers model, but for layers alone; or no such field of its config.
            ValueError: no such layers or sizes.
        """
        if self.config is not None:
            torch.manual_seed(seed)
            return from_config(teacher, **self.config)
        student = teacher if self.layers is None else take_layers(teacher, self.layers, self.path)
        student = student if self.shrink is None else self.shrink.apply(student)
        return student.requires_grad_(True)

    def set_up(self, student: nn.Module) -> None:
        """Make a student ready to be taught, in place; see `limbeck.students.taught`.

        Raises:
            ValueError: it has no token vectors to freeze.
        """
        if self.dropout is not None:
            set_dropout(student, self.dropout)
        if self._freezes(student):
            freeze_embeddings(student)

    def _freezes(self, student: nn.Module) -> bool:
        if self.freeze_embeddings != "auto":
            return self.freeze_embeddings
        of_layers = self.layers is not None and self.shrink is None
        return of_layers and token_vectors(student) is not None

    @classmethod
    def parse(cls, text: str) -> StudentSpec:
        """Read the command line's form: ``layers:1,3,5``, ``shrink:0.5``, or what ``model`` takes.

        Example:
            >>> StudentSpec.parse("layers:1,3,5").layers
            (1, 3, 5)
            >>> StudentSpec.parse("shrink:0.5").shrink.share
            0.5
        """
        kind, _, numbers = text.partition(":")
        if kind not in (LAYERS, SHRINK):
            if re.fullmatch(r"[\d\s,]+", numbers):
                raise ValueError(f"{text!r} names no model; did you mean '{LAYERS}:{numbers}'?")
            return cls(model=text)
        try:
            if kind == SHRINK:
                return cls(shrink=ShrinkSpec(share=float(numbers)))
            return cls(layers=tuple(int(n) for n in numbers.split(",")))
        except ValueError:
            example = "layers:1,3,5" if kind == LAYERS else "shrink:0.5, which is half of every size"
            raise ValueError(f"{text!r} names no {kind}; write {example}") from None
