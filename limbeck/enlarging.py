"""The extra examples of a run: made once, and kept by what made them; see `limbeck.tasks.extra`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from limbeck.atomic import write_text
from limbeck.cache.folder import TEACHER
from limbeck.models import STORE, fingerprint, load_model
from limbeck.plan import Observer
from limbeck.recipe import Recipe
from limbeck.tasks import Task, is_regression
from limbeck.tasks.extra import (
    MASKED_LM,
    REPLACE,
    Extra,
    ExtraSpec,
    check_texts,
    make_extra,
    unlabelled,
)
from limbeck.tasks.noise import NEAREST
from limbeck.tasks.rewriting import CandidatesOf, MaskedWords, Neighbours
from limbeck.train import Examples, Settings
from limbeck.train.data import ExampleBatches

FORMAT = 2
KEPT = "extra.json"
"""The file beside a cache that holds the texts which its teacher was asked about."""


@dataclass(frozen=True)
class Wanted:
    """The extra examples that a recipe wants, and what they are a function of.

    Attributes:
        spec: The recipe's part.
        recipe: The recipe, with the teacher.
        task: The task with its data.
        processor: The teacher's tokenizer.
    """

    spec: ExtraSpec
    recipe: Recipe
    task: Task
    processor: Any

    @classmethod
    def by(cls, recipe: Recipe, task: Task, processor: Any) -> Wanted | None:
        """What a recipe wants; None where it names no extra examples.

        Raises:
            ValueError: the task's examples are no texts.
        """
        if recipe.extra is None:
            return None
        check_texts(task)
        return cls(recipe.extra, recipe, task, processor)

    @cached_property
    def made_by(self) -> dict[str, Any]:
        """What makes them; of a teacher that is here too, whose embedding may be used.

        Raises:
            ValueError: a file of unlabelled text that is not there.
        """
        spec = self.spec.model_dump(mode="json", exclude={"compare", "data"})
        return {
            "format": FORMAT,
            "extra": spec,
            "files": self.spec.digest(),
            "data": {name: rows.fingerprint() for name, rows in self.task.splits.items()},
            "mask": self._mask(),
            **brought(self.spec),
        }

    def make(self, cache: Path | None = None, observer: Observer | None = None) -> Extra:
        """Make them, or load them where they were made before.

        Args:
            cache: The folder that stands for a teacher which is not here.
            observer: Is told of what takes long.

        Raises:
            ValueError: see `limbeck.tasks.extra.make_extra`; an embedding is needed that is not here.
        """
        made_by = dict(self.made_by)
        if cache is not None and (found := self._read(cache / TEACHER / KEPT)):
            return found
        if REPLACE in self.spec.augment:
            if cache is not None:
                raise ValueError(
                    f"augment: replace takes neighbours in the teacher's embedding, and {cache} was not built "
                    "with these extra examples; build it with this very recipe, or leave replace out"
                )
            made_by["teacher"] = fingerprint(self.recipe.teacher.model)
        key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        file = Path(self.recipe.store or STORE).expanduser() / "extra" / f"{key[:20]}.json"
        found = self._read(file)
        if found is None:
            found = self._made_now(observer or Observer())
            self._write(found, file)
        return found

    def _made_now(self, observer: Observer) -> Extra:
        def tell(done: int, total: int) -> None:
            if MASKED_LM in self.spec.augment:  # all else is done at once
                observer.on_count("extra", done, total)

        if MASKED_LM in self.spec.augment:
            observer.on_note(f"{self.spec.masked_lm} fills words in, each masked by itself; that is done once")
        return make_extra(self.spec, self.task, self.recipe.task, self._candidates(), self._mask(), tell)

    def keep(self, extra: Extra, cache: Path) -> None:
        """Lay them beside a cache, so that it can stand for the teacher of a run with these very examples."""
        self._write(extra, cache / TEACHER / KEPT)

    def _write(self, extra: Extra, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        data = {"made by": self.made_by, "origins": extra.origins, "dropped": extra.dropped}
        write_text(file, json.dumps({**data, "texts": extra.rows.inputs}, ensure_ascii=False))

    def _read(self, file: Path) -> Extra | None:
        """What was written; None where there is nothing, something else, or half of it."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            texts = [tuple(map(str, row)) for row in data["texts"]]
            if data["made by"] != json.loads(json.dumps(self.made_by)):
                return None
            return Extra(unlabelled(texts, is_regression(self.task)), data["origins"], data["dropped"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _mask(self) -> str | None:
        """The token of the teacher's tokenizer that masks; None where it has none."""
        from transformers import PreTrainedTokenizerBase

        return self.processor.mask_token if isinstance(self.processor, PreTrainedTokenizerBase) else None

    def _candidates(self) -> Mapping[str, CandidatesOf]:
        """What gives candidates, by augmentation; nothing is loaded for those that are not wanted."""
        sources: dict[str, Callable[[int], CandidatesOf]] = {REPLACE: self._neighbours, MASKED_LM: self._masked}
        augment = self.spec.augment
        return {name: make(augment[name].get("k", NEAREST)) for name, make in sources.items() if name in augment}

    def _neighbours(self, k: int) -> CandidatesOf:
        """Neighbours in the embedding of the teacher as the recipe names it, before it is fine-tuned."""
        from transformers import PreTrainedModel

        spec = self.recipe.teacher
        loaded = load_model(self.task, spec.model, spec.options, spec.training.seed)
        if not isinstance(loaded.model, PreTrainedModel) or loaded.processor is None:
            raise ValueError(
                f"augment: replace takes neighbours in the teacher's embedding, and {spec.model} is no model of "
                "transformers with a tokenizer; leave replace out"
            )
        return Neighbours(loaded.model.get_input_embeddings().weight, loaded.processor, k)

    def _masked(self, k: int) -> CandidatesOf:
        assert self.spec.masked_lm is not None
        return MaskedWords.load(self.spec.masked_lm, k)


def brought(spec: ExtraSpec) -> dict[str, str]:
    """Hashes of what else makes extra examples: a user's own augmentations, the model that fills words in."""
    own = {name: fingerprint(name) for name in spec.augment if ":" in name}
    return own if spec.masked_lm is None else {**own, "masked words": fingerprint(spec.masked_lm)}


def alike(settings: Settings, data: Examples) -> Settings:
    """Settings that give every training as many updates and evaluations as one on these data, whatever it is on.

    Example:
        >>> import torch
        >>> every = Examples([{"x": torch.zeros(1)}] * 10)
        >>> made = alike(Settings(epochs=3, batch_size=4), every)
        >>> made.steps, made.evaluate_every
        (9, 3)
    """
    epoch = len(ExampleBatches(data, settings))
    every = settings.evaluate_every or epoch
    return settings.model_copy(update={"steps": settings.total_steps(epoch), "evaluate_every": every})
