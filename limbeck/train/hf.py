"""Distillation in transformers' Trainer: its options, callbacks, evaluation and checkpoints, our objective.

``trainer.model`` is the student throughout, the object that a user, a callback and a saved folder know. What is
trained is the `Distiller` around it, ``trainer.distiller``, as other trainers train a wrapped model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from limbeck.checks import check_apart
from limbeck.distiller import Distiller
from limbeck.registry import refuse_unknown
from limbeck.teachers import TeacherLike, as_teacher
from limbeck.teachers.members import load_states, states
from limbeck.terms import Term
from limbeck.train.averages import TOTAL, Averages
from limbeck.train.checkpoint import WEIGHTS, load_weights, read_tree, save_weights, write_tree
from limbeck.train.hf_checks import check_arguments, check_covered, check_made
from limbeck.train.hf_data import (
    PARTS,
    Entries,
    SpansWithin,
    StudentOnly,
    base_of,
    labels_of_first,
    samples,
    undisturbed,
    without_texts,
)
from limbeck.train.hf_step import Remembering, Update
from limbeck.train.hf_terms import default_terms, predicts_next
from limbeck.train.loop import seed_everything
from limbeck.train.refusals import check_trains

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

OPTIONS = frozenset(inspect.signature(Distiller.__init__).parameters) - {"self", "student", "teacher", "terms"}
"""What a Distiller takes beside models and terms."""

TRAINERS = frozenset(inspect.signature(Trainer.__init__).parameters) - {"self"}

Made = TypeVar("Made", bound="_Distilling")

KEPT = (
    *("model", "train_dataset", "eval_dataset", "data_collator", "processing_class", "compute_metrics"),
    "preprocess_logits_for_metrics",
)
"""What a trainer made like another has of it, beside arguments, optimizer and callbacks."""

TEACHERS = "teachers-{}"
"""The file of a checkpoint with the state of teachers that change in training, of each rank."""


class _Distilling(Base):  # type: ignore[misc]
    """What makes one of transformers' trainers distil; it stands before it among the parents."""

    model: nn.Module
    model_wrapped: nn.Module
    data_collator: Any

    # `compute_loss` divides by what counts in the whole update, all micro-batches and ranks.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *positional: Any,
        teacher: TeacherLike | None = None,
        terms: Sequence[Term] | None = None,
        **options: Any,
    ) -> None:
        refuse_unknown(options, OPTIONS | TRAINERS | {"teacher", "terms"}, f"a {type(self).__name__}")
        check_arguments(args)
        self._options = {name: options.pop(name) for name in OPTIONS & options.keys()}
        check_made(model, options.get("model_init"), teacher, terms, self._options)
        if options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func and the terms both say what the loss is; make it a Term(loss=...)")
        if model is not None:
            check_apart(model, teacher)
        read = self._options.get("teacher_read") or self._options.get("read")
        self._teacher = None if teacher is None else as_teacher(teacher, read)
        self._terms = terms
        self._made = model if isinstance(model, Distiller) else None
        super().__init__(model.student if isinstance(model, Distiller) else model, args, *positional, **options)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process are DataParallel, whose copies of the student have no "
                "taps; start with `torchrun --nproc-per-node` or `accelerate launch`, or show the process one GPU"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("this trainer does not shard models; take limbeck.fit under `accelerate launch`")
        self._averages, self._means = Averages(), dict[str, float]()
        self._update: Update | None = None
        self._ready = False
        self._distiller = self._distiller_of(self.model)
        self.add_callback(Remembering(self))

    @classmethod
    def like(cls: type[Made], trainer: Trainer, **options: Any) -> Made:
        """A trainer of another Trainer's student, with its arguments, data, optimizer and callbacks.

        Args:
            trainer: Any of transformers' Trainers; it is left as it is, but for the student, which both have.
            **options: What is to be another: ``teacher``, ``terms``, and whatever else this trainer takes.

        Raises:
            ValueError: as of this trainer.

        Example:
            >>> import tempfile
            >>> from transformers import TrainingArguments
            >>> args = TrainingArguments(tempfile.mkdtemp(), report_to=[])
            >>> plain = Trainer(nn.Linear(2, 3), args, train_dataset=[{"input": torch.ones(2)}])
            >>> term = Term("logits", loss="forward_kl")
            >>> distilling = DistillationTrainer.like(plain, teacher=nn.Linear(2, 3), terms=[term])
            >>> distilling.model is plain.model, distilling.train_dataset
            (True, [{'input': tensor([1., 1.])}])
        """
        kept = {name: getattr(trainer, name) for name in KEPT}
        optimizers = (trainer.optimizer, trainer.lr_scheduler)
        made = cls(**{**kept, "args": copy.copy(trainer.args), "optimizers": optimizers, **options})
        known = {type(callback) for callback in made.callback_handler.callbacks}
        for callback in trainer.callback_handler.callbacks:
            if type(callback) not in known:
                made.add_callback(callback)
        return made

    def train(self, *arguments: Any, **named: Any) -> Any:
        """Train; however it ends, the student is then as it was given, without hooks or compilation."""
        try:
            return super().train(*arguments, **named)
        finally:
            self._update = None
            self._distiller.keep()
            self._distiller.export()

    @property
    def distiller(self) -> Distiller:
        """The Distiller around the student, as it now is."""
        current = self._distiller
        if self.model is not current.student and self.model is not current:  # model_init made another student
            self._distiller, self._ready = self._distiller_of(self.model), False
        return self._distiller

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a student anew; a Distiller that `model_init` made is kept for it."""
        made: nn.Module = super().call_model_init(trial)
        if not isinstance(made, Distiller):
            return made
        check_made(made, None, self._teacher, self._terms, self._options)
        self._made = made
        return made.student

    # ---- what is trained ------------------------------------------------------------------------------------

    def _distiller_of(self, student: nn.Module) -> Distiller:
        if self._made is not None and self._made.student is student:
            return self._made
        terms, base = self._terms, base_of(student)
        if terms is None:
            terms = default_terms(base, self.args.label_smoothing_factor, self._some_labels)
        return Distiller(student, self._teacher, terms, **{"causal": predicts_next(base), **self._options})

    def _some_labels(self) -> Tensor | None:
        return None if self.train_dataset is None else labels_of_first(self.train_dataset)

    def _make_ready(self, loader: Any = None) -> None:
        """Check everything on two examples and size the projections, before anything is made of parameters."""
        distiller = self.distiller
        distiller.to(self.args.device)
        if self._ready:
            return
        loader = self.get_train_dataloader() if loader is None else loader
        with undisturbed():
            found = samples(loader, distiller.objective.tasks)
            batches = [self._prepare_inputs(batch) for batch in found]
            seed_everything(self.args.seed)  # projections begin as in `limbeck.fit`
            for batch in batches:
                with self.accelerator.autocast():
                    distiller.preflight(batch)
        check_trains(distiller)
        self._ready = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of all that trains: the student, projections, and what the balance learns."""
        if model is None or model is self.distiller.student:
            self._make_ready()
            model = self.distiller
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of parameters with weight decay: the student's as usual, of the objective those of matrices."""
        small = {name for name, p in model.named_parameters() if "objective." in name and p.ndim < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in small]

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        """Accelerate would compile the Distiller as a whole; what is compiled is the student."""
        from accelerate.utils import TorchDynamoPlugin

        made: dict[str, Any] = super()._build_accelerator_args(**options)
        if self._options.get("stages") or (self._made is not None and self._made.has_stages):
            for handler in made["kwargs_handlers"]:  # what rests in a stage has no gradient
                handler.find_unused_parameters = True
        return {**made, "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Wrap the Distiller where the student would have been wrapped."""
        self._make_ready(train_dataloader)
        if resume_from_checkpoint is not None:
            self._load_objective(Path(resume_from_checkpoint))
        if self.args.torch_compile:
            self.distiller.compile_student(
                backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode
            )
        given = self.optimizer is not None
        if self.model_wrapped is self.model:
            self.model_wrapped = self.distiller
        student, self.model = self.model, self.distiller
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.model = self.callback_handler.model = student
        if given:
            check_covered(self.distiller, self.optimizer)
        return prepared

    # ---- the loss -------------------------------------------------------------------------------------------

    def get_batch_samples(self, *arguments: Any, **named: Any) -> tuple[list[Any], Any]:
        """The micro-batches of an update; what is valid in all of them is counted."""
        batches, items = super().get_batch_samples(*arguments, **named)
        self._update = Update(self.accelerator, self.distiller, batches)
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective, of the Distiller; of the student alone, as in evaluations, the loss is its own."""
        if not isinstance(self.accelerator.unwrap_model(model), Distiller):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self.state.global_step
        update = self._update or Update(self.accelerator, self.distiller, ())
        output = model(
            **inputs,
            counts=update.counts,
            progress=step / max(1, self.state.max_steps - 1),
            measure=update.measures(step),
        )
        update.add(output, self._averages)
        return (output.loss, output) if return_outputs else output.loss

    def compute_loss_context_manager(self) -> ExitStack:
        """Autocast as in training: accelerate patches it into what is trained, and evaluations run the student."""
        stack: ExitStack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    # ---- the data -------------------------------------------------------------------------------------------

    def _entries(self) -> Entries:
        distiller = self.distiller
        return Entries.of(distiller.student, distiller.teacher, distiller.terms, self.label_names)

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that stay: the student's, and what the teacher and the terms read."""
        super()._set_signature_columns_if_needed()
        more = self._entries().columns - set(self._signature_columns)
        self._signature_columns += sorted(more)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """All columns stay where it cannot be known what the teacher reads."""
        entries = self._entries()
        if entries.anything or not self.args.remove_unused_columns:
            return dataset
        own = without_texts(dataset, set(PARTS) - entries.student)
        return super()._remove_unused_columns(own, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """The same for data sets that are no `datasets.Dataset`."""
        if self._entries().anything:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _get_dataloader(self, *arguments: Any, is_training: bool = False, **named: Any) -> Any:
        """A loader; an evaluation's gives the student what is for it."""
        whole = self.data_collator
        self.data_collator = SpansWithin(whole) if is_training else StudentOnly(whole, self._entries())
        try:
            return super()._get_dataloader(*arguments, is_training=is_training, **named)
        finally:
            self.data_collator = whole

    # ---- the log --------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        """All ranks come here together: the place to average the terms over them."""
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._means = self._averages.means(self.accelerator)
            self._averages.reset()
        super()._maybe_log_save_evaluate(*arguments, **named)

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """Beside the loss stands the mean of each term, unweighted, since the last line."""
        if "loss" in logs:
            logs |= {f"terms/{name}": value for name, value in self._means.items() if name != TOTAL}
            self._means = {}
        super().log(logs, *arguments, **named)

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student, as any transformers model is saved; of a checkpoint, also what trains with it."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            self._save_objective(Path(output_dir))

    def _save_objective(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.distiller.keep()
        changing = states(self.distiller.teacher)
        if changing:
            write_tree(changing, folder, TEACHERS.format(self.args.process_index))
        if self.args.should_save:
            save_weights(self.distiller.objective, folder / WEIGHTS)

    def _load_objective(self, folder: Path) -> None:
        """Load what `_save_objective` saved.

        Raises:
            ValueError: a checkpoint of another kind of training, or of other terms.
        """
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} has no {WEIGHTS}: it is no checkpoint of a distillation; begin without it")
        load_weights(self.distiller.objective, folder / WEIGHTS)
        name = TEACHERS.format(self.args.process_index)
        load_states(self.distiller.teacher, read_tree(folder, name) if (folder / f"{name}.json").is_file() else {})

    def _load_best_model(self) -> None:
        """End with the best student, and with the projections that it had."""
        super()._load_best_model()
        self._load_objective(Path(self.state.best_model_checkpoint))


class DistillationTrainer(_Distilling, Trainer):  # type: ignore[misc]
    """transformers' Trainer, with a teacher.

    All of Trainer's arguments and options are there. ``trainer.model`` is the student; evaluation, prediction and
    ``save_model`` are of the student alone, and never run the teacher. What trains is ``trainer.distiller``.

    A checkpoint is a plain folder of the student, and beside Trainer's own states ``distiller.safetensors`` with
    projections and whatever else trains with it. The teacher is in neither.

    The loss does not depend on padding, on ``gradient_accumulation_steps`` or on the number of ranks: each term
    is divided by what counts for it in the whole update. Terms are logged as ``terms/<name>``, without weights.

    Args:
        model: The student, or a `Distiller` (then without `teacher`, `terms` and options of a Distiller).
        args: TrainingArguments. ``label_smoothing_factor`` is for the default terms and the loss of evaluations;
            terms of your own have an option for it.
        *positional: Trainer's other arguments, in its order.
        teacher: Whatever `limbeck.teachers.as_teacher` takes, or None for plain training.
        terms: What is to be learned; by default what suits the student's task, `hf_terms.default_terms`.
        **options: Trainer's other arguments, and those of a `Distiller`: ``balance``, ``read``, ``layerwise``, ...
            ``causal`` is set by itself where the student is a causal language model.

    Raises:
        ValueError: what a Distiller refuses; a Distiller beside terms or a teacher; ``compute_loss_func``;
            several GPUs in one process; sharded training.
        TypeError: an argument that there is not.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> teacher, student = BertForSequenceClassification(config), BertForSequenceClassification(config)
        >>> data = [{"input_ids": [i % 9, 1], "labels": i % 2} for i in range(8)]
        >>> folder = tempfile.mkdtemp()
        >>> args = TrainingArguments(folder, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
        >>> trainer = DistillationTrainer(student, args, train_dataset=data, teacher=teacher)
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step, trainer.model is student
        (2, True)
    """


class Seq2SeqDistillationTrainer(_Distilling, Seq2SeqTrainer):  # type: ignore[misc]
    """The same of transformers' Seq2SeqTrainer, whose evaluations can generate; see `DistillationTrainer`."""
