"""One stage of a run: train a model, predict with it, and keep all of it, so that it need not happen twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from limbeck.atomic import write_tensors, write_text
from limbeck.distiller import Distiller
from limbeck.metrics import Array
from limbeck.train import Callback, Examples, FitResult, JsonLog, Settings, fit, predict
from limbeck.train.checkpoint import load_weights, save_weights

RESULT = "result.json"
WEIGHTS = "final.safetensors"
PREDICTIONS = "predictions.safetensors"


@dataclass(frozen=True)
class StageResult:
    """What came of a stage.

    Attributes:
        fitted: What the training did; None for a model that was used as it is.
        logits: Predictions (N, C) by evaluation split.
    """

    fitted: FitResult | None
    logits: dict[str, Array]


@dataclass(frozen=True)
class Stage:
    """Where a stage keeps its things, and on what data it works.

    Attributes:
        name: Its name in the log: ``teacher``, ``baseline-0``, ``student-0``.
        folder: For its checkpoints and its result.
        log: The run's log.
        train: Training examples.
        choose: Examples to evaluate on during training, by which a model may be chosen.
        evaluate: Examples of each evaluation split.
        metric: The main metric.
        device: Where models predict, whether they were trained now or before.
    """

    name: str
    folder: Path
    log: Path
    train: Examples
    choose: Examples
    evaluate: Mapping[str, Examples]
    metric: str
    device: torch.device

    def is_done(self) -> bool:
        """Whether the stage has its result."""
        return (self.folder / RESULT).is_file()

    def run(
        self, distiller: Distiller, settings: Settings, callbacks: Sequence[Callback] = ()
    ) -> tuple[nn.Module, StageResult]:
        """Train, or go on training, or load what was trained before."""
        if self.is_done():
            return self._load(distiller.student)
        self.folder.mkdir(parents=True, exist_ok=True)
        watchers = [JsonLog(self.log, self.name), *callbacks]
        fitted = fit(
            distiller,
            self.train,
            self.choose,
            settings,
            metric=self.metric,
            callbacks=watchers,
            folder=self.folder,
        )
        model = distiller.export()
        result = StageResult(fitted, self.predict(model))
        self._keep(model, result)
        return model, result

    def predict(self, model: nn.Module) -> dict[str, Array]:
        """Predictions of a model on every evaluation split."""
        model.to(self.device)
        return {name: predict(model, examples).logits for name, examples in self.evaluate.items()}

    def _keep(self, model: nn.Module, result: StageResult) -> None:
        """Write the result last: where it stands, the stage is done."""
        assert result.fitted is not None
        save_weights(model, self.folder / WEIGHTS)
        write_tensors(self.folder / PREDICTIONS, {n: torch.from_numpy(a) for n, a in result.logits.items()})
        write_text(self.folder / RESULT, json.dumps(dataclasses.asdict(result.fitted)))

    def _load(self, model: nn.Module) -> tuple[nn.Module, StageResult]:
        load_weights(model, self.folder / WEIGHTS)
        data: dict[str, Any] = json.loads((self.folder / RESULT).read_text())
        data["history"] = [(step, score) for step, score in data["history"]]
        logits = {name: t.numpy() for name, t in load_file(self.folder / PREDICTIONS).items()}
        return model, StageResult(FitResult(**data), logits)
