"""AutoGluon's MultiModalPredictor, by limbeck: ``from limbeck.compat.automm import MultiModalPredictor``.

What it does is done by `limbeck.frame_model`, which can be used without it. See docs/coming-from.md.
"""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.compat.automm_options import Hyperparameters, Options, flattened
from limbeck.evaluate import count_parameters, size_in_bytes
from limbeck.frame_model import TRAINING, FrameModel, check_folder, fit_frame_model
from limbeck.registry import nearest, refuse_unknown
from limbeck.tasks.column_kinds import CLASSIFICATION, PROBLEMS, REGRESSION, as_frame
from limbeck.tasks.frames import Columns

if TYPE_CHECKING:
    import pandas as pd

MODEL, DATA, OPTIM, OPTIMIZATION, ENVIRONMENT, DISTILLER = (
    *("model", "data", "optim", "optimization", "env", "distiller"),
)
"""Keys of AutoMM's ``config``, which scripts import."""

CONFIGS = ("default", "adamw", "fusion_mlp_image_text_tabular")
"""AutoMM's named groups of defaults, whose values `Options` has."""

KEPT = ("eval_metric", "validation_metric", "hyperparameters", "presets")
"""Arguments of a predictor that are kept with its model."""

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
        refuse_unknown(ignored, ("warn_if_exist", "enable_progress_bar"), "MultiModalPredictor")
        problem = problem_type.lower() if problem_type else None
        known = (*PROBLEMS, CLASSIFICATION)
        if problem not in (None, *known):
            raise ValueError(f"unknown problem_type {problem_type!r}; {nearest(str(problem), known)}")
        if eval_metric in ("rmse", "r2", "pearsonr", "spearmanr", "root_mean_squared_error"):
            problem = REGRESSION
        self.label, self.eval_metric = None if label is None else str(label), eval_metric
        self.validation_metric, self.presets = validation_metric or eval_metric, presets
        self.path = None if path is None else str(path)
        self._problem, self.hyperparameters = problem, flattened(hyperparameters)
        self._model: FrameModel | None = None
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
        refuse_unknown(ignored, ("standalone", "clean_ckpts"), "fit")
        _check_config(config)
        options = Options.parse({**self.hyperparameters, **flattened(hyperparameters)}, presets or self.presets)
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
        terms = options.terms(columns.problem == REGRESSION, taught=teacher is not None)
        stamp = datetime.datetime.now().strftime("ag-%Y%m%d_%H%M%S_%f")
        self.path = str(save_path or self.path or Path("AutogluonModels") / stamp)
        check_folder(self.path)
        if not self._resumes:
            shutil.rmtree(Path(self.path) / TRAINING, ignore_errors=True)
        model.notes.update({name: getattr(self, name) for name in KEPT})
        measured = METRIC_NAMES.get(chosen, chosen)
        fit_frame_model(model, train, tuning, settings, terms, teacher=teacher, metric=measured, folder=self.path)
        self._model, self._resumes = model, False
        return self

    def evaluate(self, data: Any, metrics: Any = None, return_pred: bool = False, **ignored: Any) -> Any:
        """Scores by name; with `return_pred` also the predictions.

        Raises:
            ValueError: an unknown metric, or one for another kind of problem.
        """
        refuse_unknown(ignored, ("realtime",), "evaluate")
        frame = as_frame(data)
        names = metrics or self.eval_metric or DEFAULT_METRICS[self.model.columns.problem]
        names = [names] if isinstance(names, str) else list(names)
        own = [METRIC_NAMES.get(name, name) for name in names]
        logits = self.model.logits(frame)
        found = self.model.scores(logits, frame, own)
        scores = {name: found[metric] for name, metric in zip(names, own, strict=True)}
        return (scores, self._shaped(self.model.labels(logits), frame, None)) if return_pred else scores

    def predict(self, data: Any, as_pandas: bool | None = None, **ignored: Any) -> Any:
        """The predicted labels, (N,)."""
        refuse_unknown(ignored, ("realtime",), "predict")
        frame = as_frame(data)
        return self._shaped(self.model.labels(self.model.logits(frame)), frame, as_pandas)

    def predict_proba(
        self, data: Any, as_pandas: bool | None = None, as_multiclass: bool = True, **ignored: Any
    ) -> Any:
        """The probability of each class, (N, C); of the second of two alone where `as_multiclass` is False.

        Raises:
            ValueError: a number is predicted.
        """
        refuse_unknown(ignored, ("realtime",), "predict_proba")
        frame = as_frame(data)
        shares = self.model.probabilities(self.model.logits(frame))
        if not as_multiclass and shares.shape[1] == 2:
            return self._shaped(shares[:, 1], frame, as_pandas)
        return self._shaped(shares, frame, as_pandas, self.class_labels)

    def extract_embedding(self, data: Any, as_pandas: bool = False, **ignored: Any) -> Any:
        """What the network's head reads of each row, (N, D)."""
        refuse_unknown(ignored, ("realtime",), "extract_embedding")
        frame = as_frame(data)
        return self._shaped(self.model.features(frame), frame, as_pandas)

    def fit_summary(self, verbosity: int = 0, show_plot: bool = False) -> dict[str, Any]:
        """The best score on the tuning data and the seconds of the last `fit`; nothing of one that did not end."""
        told = dict(self.model.notes.get("fit", {}))
        if not told:
            return told
        name = f"val_{self.validation_metric or DEFAULT_METRICS[self.model.columns.problem]}"
        return {name: told.pop("best_score"), "training_time": told.pop("seconds"), **told}

    def save(self, path: str | Path, standalone: bool = True) -> None:
        """Write the predictor as JSON and safetensors; it needs nothing else.

        Raises:
            ValueError: nothing was trained yet, or the folder holds something else.
        """
        self.model.save(path)

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
        model = FrameModel.load(path, resume)
        kept: dict[str, Any] = {name: model.notes.get(name) for name in KEPT}
        made = cls(model.columns.label, model.columns.problem, path=path, **kept)
        made._model, made._resumes = model, resume
        return made

    def _untrained(
        self, train: pd.DataFrame, options: Options, given: Any, teacher: FrameModel | None, seed: int
    ) -> FrameModel:
        if self.label is None:
            raise ValueError("no label; name the column to predict: MultiModalPredictor(label=...)")
        like = None if teacher is None else teacher.columns
        columns = Columns.find(train, self.label, self._problem, given=given, allowed=options.kinds(), like=like)
        return FrameModel.build(columns, **options.architecture(), seed=seed)

    def _shaped(self, values: Any, frame: pd.DataFrame, as_pandas: bool | None, columns: Any = None) -> Any:
        """Values by row as an array, or as a Series (N,) or DataFrame (N, C)."""
        if as_pandas is False:
            return values
        import pandas as pd

        if values.ndim == 1:
            return pd.Series(values, index=frame.index, name=self.label)
        return pd.DataFrame(values, index=frame.index, columns=columns)


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
