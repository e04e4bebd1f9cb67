"""AutoGluon's MultiModalPredictor, by limbeck: ``from limbeck.compat.automm import MultiModalPredictor``.

What it does is done by `limbeck.frame_model`, which can be used without it. See docs/coming-from.md.
"""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.atomic import write_text
from limbeck.compat.automm_options import Hyperparameters, Options, flattened
from limbeck.evaluate import count_parameters, size_in_bytes
from limbeck.frame_model import FrameModel, fit_frame_model
from limbeck.registry import nearest
from limbeck.tasks.column_kinds import CLASSIFICATION, PROBLEMS, REGRESSION, as_frame
from limbeck.tasks.frames import Columns
from limbeck.train import Callback
from limbeck.train.callbacks import State

if TYPE_CHECKING:
    import pandas as pd

MODEL, DATA, OPTIM, OPTIMIZATION, ENVIRONMENT, DISTILLER = (
    *("model", "data", "optim", "optimization", "env", "distiller"),
)
"""Keys of AutoMM's ``config``, which scripts import."""

CONFIGS = ("default", "adamw", "fusion_mlp_image_text_tabular")
"""AutoMM's named groups of defaults, whose values `Options` has."""

PREDICTOR, TRAINING = "predictor.json", "training"

METRIC_NAMES = {
    "acc": "accuracy",
    "f1_macro": "macro_f1",
    "mcc": "matthews",
    "pearsonr": "pearson",
    "spearmanr": "spearman",
    "root_mean_squared_error": "rmse",
    "mean_squared_error": "mse",
}
DEFAULT_METRICS = {"binary": "roc_auc", "multiclass": "accuracy", "regression": "root_mean_squared_error"}


class MultiModalPredictor:
    """Predicts one column of a data frame from the others: texts, categories, numbers and images.

    Args:
        label: The column to predict.
        problem_type: ``"binary"``, ``"multiclass"``, ``"classification"`` or ``"regression"``; by default found.
        eval_metric: By default ROC AUC, accuracy or the root of the mean squared error, by the problem.
        hyperparameters: Hyperparameters of every `fit`.
        path: Folder of the predictor; by default a new one under ``AutogluonModels``.
        presets: Which encoders are used where none is named.
        validation_metric: Chooses the best epoch; by default `eval_metric`.
        verbosity: Taken and not used: nothing is printed.
        **ignored: Arguments of AutoMM that change nothing here.

    Raises:
        ValueError: an unknown problem type.

    Example:
        >>> import pandas as pd, tempfile
        >>> frame = pd.DataFrame({"x": [float(i % 7) for i in range(64)], "y": [i % 7 > 3 for i in range(64)]})
        >>> predictor = MultiModalPredictor(label="y", path=tempfile.mkdtemp())
        >>> quick = {"optim.max_epochs": 20, "optim.lr": 0.02, "env.batch_size": 16}
        >>> predictor.fit(frame, tuning_data=frame, hyperparameters=quick).evaluate(frame)
        {'roc_auc': 1.0}
    """

    def __init__(
        self,
        label: str | None = None,
        problem_type: str | None = None,
        eval_metric: str | None = None,
        hyperparameters: Hyperparameters = None,
        path: str | Path | None = None,
        presets: str | None = None,
        validation_metric: str | None = None,
        verbosity: int = 3,
        **ignored: Any,
    ) -> None:
        _refuse(ignored, ("warn_if_exist", "enable_progress_bar"))
        problem = problem_type.lower() if problem_type else None
        known = (*PROBLEMS, CLASSIFICATION)
        if problem not in (None, *known):
            raise ValueError(f"unknown problem_type {problem_type!r}; {nearest(str(problem), known)}")
        if eval_metric in ("rmse", "r2", "pearsonr", "spearmanr", "root_mean_squared_error"):
            problem = REGRESSION
        self.label, self.eval_metric = None if label is None else str(label), eval_metric
        self.validation_metric = validation_metric or eval_metric
        self.path = None if path is None else str(path)
        self._problem, self._presets, self._own = problem, presets, hyperparameters
        self._model: FrameModel | None = None
        self._summary: dict[str, Any] = {}
        self._resumes = False

    @property
    def model(self) -> FrameModel:
        """The trained model; limbeck's own, with its network.

        Raises:
            ValueError: nothing was trained yet.
        """
        if self._model is None:
            raise ValueError("the predictor is not trained; call fit first")
        return self._model

    @property
    def problem_type(self) -> str | None:
        """What is predicted."""
        return self._problem if self._model is None else self._model.columns.problem

    @property
    def column_types(self) -> dict[str, str]:
        """What the columns hold."""
        return self.model.columns.types

    @property
    def class_labels(self) -> list[Any]:
        """The classes in the order of the probabilities."""
        return list(self.model.columns.classes)

    @property
    def total_parameters(self) -> int:
        """The number of parameters."""
        return count_parameters(self.model.network)

    @property
    def model_size(self) -> float:
        """Of the weights, in megabytes."""
        return size_in_bytes(self.model.network) * 1e-6

    def fit(
        self,
        train_data: Any,
        presets: str | None = None,
        *,
        tuning_data: Any = None,
        time_limit: float | None = None,
        save_path: str | Path | None = None,
        hyperparameters: Hyperparameters = None,
        column_types: dict[str, str] | None = None,
        holdout_frac: float | None = None,
        teacher_predictor: MultiModalPredictor | str | Path | None = None,
        seed: int = 0,
        config: dict[str, str] | None = None,
        **ignored: Any,
    ) -> MultiModalPredictor:
        """Train, or train on; with a teacher, distil.

        Args:
            train_data: A data frame, or the path of a table.
            presets: Which encoders are used where none is named.
            tuning_data: For evaluations on the way; by default a part of the training data.
            time_limit: Seconds.
            save_path: Folder of the predictor.
            hyperparameters: A dictionary, ``"name=value name=value"`` or a list of such.
            column_types: What some columns hold.
            holdout_frac: Share of the training data for evaluations on the way.
            teacher_predictor: A trained predictor, or its folder.
            seed: Of the new layers, the holdout and the order of the data.
            config: AutoMM's named groups of defaults, ``{"distiller": "default"}``; other ones are refused.
            **ignored: Arguments of AutoMM that change nothing here.

        Raises:
            TypeError: an unknown hyperparameter.
            ValueError: data, labels or a teacher that do not go together, or a folder that holds something else.
        """
        _refuse(ignored, ("standalone", "clean_ckpts"))
        _check_config(config)
        options = Options.parse({**flattened(self._own), **flattened(hyperparameters)}, presets or self._presets)
        teacher = _teacher(teacher_predictor)
        train = as_frame(train_data)
        model = self._model or self._untrained(train, options, column_types, teacher, seed)
        columns = model.columns
        if tuning_data is None:
            train, tuning = columns.split(train, holdout_frac, seed)
        else:
            tuning = as_frame(tuning_data)
        chosen = self.validation_metric or DEFAULT_METRICS[columns.problem]
        settings = options.settings(len(train), seed, time_limit)
        widths = None if teacher is None else (model.network.features.width, teacher.network.features.width)
        terms = options.terms(columns.problem == REGRESSION, widths)
        folder = self._folder(save_path)
        fitted = fit_frame_model(
            model,
            train,
            tuning,
            settings,
            terms,
            teacher=teacher,
            metric=METRIC_NAMES.get(chosen, chosen),
            callbacks=[_Begun(self, model, folder)],
            folder=folder / TRAINING,
        )
        self._model = model
        scored = {f"val_{chosen}": fitted.best_score, "training_time": fitted.seconds}
        self._summary = {**scored, "steps": fitted.steps, "teacher_examples": fitted.teacher_examples}
        self._resumes = False
        self._save(folder, model, done=True)
        shutil.rmtree(folder / TRAINING)
        return self

    def evaluate(self, data: Any, metrics: Any = None, return_pred: bool = False, **ignored: Any) -> Any:
        """Scores by name; with `return_pred` also the predictions.

        Raises:
            ValueError: an unknown metric, or one for another kind of problem.
        """
        _refuse(ignored, ("realtime",))
        frame = as_frame(data)
        names = metrics or self.eval_metric or DEFAULT_METRICS[self.model.columns.problem]
        names = [names] if isinstance(names, str) else list(names)
        own = [METRIC_NAMES.get(name, name) for name in names]
        logits = self.model.logits(frame)
        found = self.model.scores(logits, frame, own)
        scores = {name: found[metric] for name, metric in zip(names, own, strict=True)}
        return (scores, self._series(self.model.labels(logits), frame)) if return_pred else scores

    def predict(self, data: Any, as_pandas: bool | None = None, **ignored: Any) -> Any:
        """The predicted labels, (N,)."""
        _refuse(ignored, ("realtime",))
        frame = as_frame(data)
        labels = self.model.labels(self.model.logits(frame))
        return labels if as_pandas is False else self._series(labels, frame)

    def predict_proba(
        self, data: Any, as_pandas: bool | None = None, as_multiclass: bool = True, **ignored: Any
    ) -> Any:
        """The probability of each class, (N, C); of the second of two alone where `as_multiclass` is False.

        Raises:
            ValueError: a number is predicted.
        """
        _refuse(ignored, ("realtime",))
        frame = as_frame(data)
        shares = self.model.probabilities(self.model.logits(frame))
        if not as_multiclass and shares.shape[1] == 2:
            return shares[:, 1] if as_pandas is False else self._series(shares[:, 1], frame)
        if as_pandas is False:
            return shares
        import pandas as pd

        return pd.DataFrame(shares, columns=self.class_labels, index=frame.index)

    def extract_embedding(self, data: Any, as_pandas: bool = False, **ignored: Any) -> Any:
        """What the network's head reads of each row, (N, D)."""
        _refuse(ignored, ("realtime",))
        frame = as_frame(data)
        features = self.model.features(frame)
        if not as_pandas:
            return features
        import pandas as pd

        return pd.DataFrame(features, index=frame.index)

    def fit_summary(self, verbosity: int = 0, show_plot: bool = False) -> dict[str, Any]:
        """The best score on the tuning data and the seconds of the last `fit`."""
        return dict(self._summary)

    def save(self, path: str | Path, standalone: bool = True) -> None:
        """Write the predictor as JSON and safetensors; it needs nothing else.

        Raises:
            ValueError: nothing was trained yet, or the folder holds something else.
        """
        _check_folder(Path(path))
        self._save(Path(path), self.model, done=True)

    @classmethod
    def load(cls, path: str | Path, resume: bool = False, verbosity: int = 3) -> MultiModalPredictor:
        """Load a predictor.

        Args:
            path: Its folder.
            resume: Whether the next `fit` goes on with a training that was interrupted.
            verbosity: Taken and not used.

        Raises:
            ValueError: there is none, or its training did not end.
        """
        folder = Path(path)
        if not (folder / PREDICTOR).is_file():
            raise ValueError(f"{folder} holds no predictor, for it has no {PREDICTOR}; correct the path")
        kept = json.loads((folder / PREDICTOR).read_text())
        if not kept["done"] and not resume:
            raise ValueError(f"the training of {folder} did not end; load it with resume=True, and call fit again")
        made = cls(kept["label"], kept["problem_type"], kept["eval_metric"], kept["hyperparameters"], folder)
        made.validation_metric = kept["validation_metric"]
        made._presets, made._model, made._summary = kept["presets"], FrameModel.load(folder), kept["summary"]
        made._resumes = resume and not kept["done"]
        return made

    def _untrained(
        self, train: pd.DataFrame, options: Options, given: Any, teacher: FrameModel | None, seed: int
    ) -> FrameModel:
        if self.label is None:
            raise ValueError("no label; name the column to predict: MultiModalPredictor(label=...)")
        like = None if teacher is None else teacher.columns
        columns = Columns.find(train, self.label, self._problem, given=given, allowed=options.kinds(), like=like)
        return FrameModel.build(columns, **options.architecture(), seed=seed)

    def _folder(self, save_path: str | Path | None) -> Path:
        """Where the predictor goes; what an earlier training left there is of no use to this one."""
        stamp = datetime.datetime.now().strftime("ag-%Y%m%d_%H%M%S_%f")
        folder = Path(save_path or self.path or Path("AutogluonModels") / stamp)
        _check_folder(folder)
        if not self._resumes:
            shutil.rmtree(folder / TRAINING, ignore_errors=True)
        self.path = str(folder)
        return folder

    def _save(self, folder: Path, model: FrameModel, done: bool) -> None:
        model.save(folder)
        kept = {
            "label": self.label,
            "problem_type": model.columns.problem,
            "eval_metric": self.eval_metric,
            "validation_metric": self.validation_metric,
            "hyperparameters": flattened(self._own),
            "presets": self._presets,
            "summary": self._summary,
            "done": done,
        }
        write_text(folder / PREDICTOR, json.dumps(kept))

    def _series(self, values: Any, frame: pd.DataFrame) -> pd.Series:
        import pandas as pd

        return pd.Series(values, index=frame.index, name=self.label)


@dataclass
class _Begun(Callback):
    """Writes the folder as a training begins, so that what is refused before leaves an older predictor in it."""

    predictor: MultiModalPredictor
    model: FrameModel
    folder: Path

    def on_start(self, state: State) -> None:
        """Before the first step."""
        if state.step == 0:
            self.predictor._save(self.folder, self.model, done=False)


def _teacher(teacher: Any) -> FrameModel | None:
    if teacher is None:
        return None
    loaded = MultiModalPredictor.load(teacher) if isinstance(teacher, (str, Path)) else teacher
    if not isinstance(loaded, MultiModalPredictor):
        raise TypeError(f"a teacher is a trained predictor or its folder, got a {type(teacher).__name__}")
    return loaded.model


def _check_config(config: dict[str, str] | None) -> None:
    for group, name in (config or {}).items():
        if name not in CONFIGS:
            raise ValueError(f"config has {group!r}: {name!r}, which is not read; pass hyperparameters instead")


def _check_folder(folder: Path) -> None:
    """Refuse to write among files that are not a predictor's."""
    if (
        folder.is_dir()
        and any(path.name != TRAINING for path in folder.iterdir())
        and not (folder / PREDICTOR).is_file()
    ):
        raise ValueError(f"{folder} holds other files and no predictor; choose another folder")


def _refuse(given: dict[str, Any], known: tuple[str, ...]) -> None:
    """Arguments of AutoMM that change nothing here are taken; others are not."""
    for name in given:
        if name not in known:
            raise TypeError(f"limbeck's MultiModalPredictor has no argument {name!r}; {nearest(name, known)}")
