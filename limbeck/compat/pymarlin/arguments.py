"""PyMarlin's options, and ``CustomArgParser``, which reads them from a YAML file and the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from limbeck.recipe import read_yaml
from limbeck.strict import Strict
from limbeck.yaml_options import change_values


class Options(Strict):
    """Options by name, which a script may also set later."""

    model_config = ConfigDict(frozen=False)


class DefaultCheckpointerArguments(Options):
    """Where checkpoints go and where a training begins.

    They are folders of safetensors and JSON, not pickles, and one is written after each epoch; `period`,
    `file_ext` and `log_level` are accepted and of no effect.

    Attributes:
        checkpoint: Whether to write any.
        delete_existing_checkpoints: Delete those of earlier trainings of this prefix under `save_dir` first.
        save_dir: Each training gets a folder of its own here, ``model``, ``model-2``, ...
        model_state_save_dir: Where the module's state goes at the end; None for nowhere.
        load_dir: Where to look for a checkpoint to go on from, the newest there is.
        load_filename: The checkpoint under `load_dir` to begin from, ``"model/step-00000120"``.
        file_prefix: The name of the trainings' folders.

    Example:
        >>> DefaultCheckpointerArguments(checkpoint=False).file_prefix
        'model'
    """

    checkpoint: bool = True
    delete_existing_checkpoints: bool = False
    period: int = 1
    save_dir: str = "checkpoints"
    model_state_save_dir: str | None = "checkpoints"
    load_dir: str | None = None
    load_filename: str | None = None
    file_prefix: str = "model"
    file_ext: str = "safetensors"
    log_level: str = "INFO"


class DistributedTrainingArguments(Options):
    """What a script may state of its ranks; the launcher decides, and a `Trainer` refuses another `world_size`.

    Example:
        >>> DistributedTrainingArguments().world_size
        1
    """

    local_rank: int = 0
    global_rank: int = 0
    world_size: int = 1
    backend: str = "nccl"
    init_method: str = "env://"
    gather_frequency: int | None = None


class StatInitArguments(Options):
    """When statistics are written: `log_steps`; what else there was is accepted and of no effect.

    Example:
        >>> StatInitArguments(log_steps=20).log_steps
        20
    """

    log_steps: PositiveInt = 1
    update_system_stats: Literal[False] = False
    log_model_steps: int = 1000
    exclude_list: str = ""


class WriterInitArguments(Options):
    """Where TensorBoard's files go: `tb_log_dir`; what else there was is accepted and of no effect.

    Example:
        >>> WriterInitArguments().tb_log_dir
        'logs'
    """

    tb_log_dir: str = "logs"
    tb_logpath_parent_env: None = None
    tb_log_multi: bool = False
    tb_log_hist_steps: int = 20000
    model_log_level: str = "INFO"


class TrainerArguments(Options):
    """How to train.

    Attributes:
        epochs: Passes over the data.
        use_gpu: Train on a GPU if there is one.
        train_batch_size: Examples of one update, over all ranks.
        gpu_batch_size_limit: How many of them fit a device at once; gradients are accumulated for the rest.
        val_batch_size: Examples of a batch of validation.
        max_train_steps_per_epoch: Updates after which an epoch ends.
        max_val_steps_per_epoch: Batches after which a validation ends.
        clip_grads: Whether gradients are clipped.
        max_grad_norm: The largest norm of the gradient of all that the optimizers hold.
        reset_optimizers_schedulers: Begin from a checkpoint's weights with new optimizers and schedulers.
        checkpointer_args: See `DefaultCheckpointerArguments`.
        distributed_training_args: What the script states of its ranks.
        writers: Names, ``"stdout"`` and ``"tensorboard"``, or functions of numbers by name and the step.
        stats_args: When statistics are written.
        writer_args: Options of the writers.
        disable_tqdm: Accepted, and of no effect: there is no progress bar.
        log_level: Accepted, and of no effect: logging is set up by the application.
        backend: How it runs, where the trainer is given none; see `build_trainer_backend`.
        amp_backend_native: Half precision, as the backend ``"sp-amp"``.
        amp_backend_apex: Not supported, nor is `amp_level_apex`.
        differential_privacy_args: Not supported.

    Raises:
        ValueError: an unknown option, a size that is no positive number, or what is not supported.

    Example:
        >>> TrainerArguments(epochs=0)
        Traceback (most recent call last):
        ValueError: epochs: Input should be greater than 0 (got 0)
    """

    epochs: PositiveInt = 1
    use_gpu: bool = True
    train_batch_size: PositiveInt = 1
    gpu_batch_size_limit: PositiveInt = 512
    val_batch_size: PositiveInt = 1
    max_train_steps_per_epoch: PositiveInt | None = None
    max_val_steps_per_epoch: PositiveInt | None = None
    clip_grads: bool = True
    max_grad_norm: PositiveFloat = 1.0
    reset_optimizers_schedulers: bool = False
    checkpointer_args: DefaultCheckpointerArguments = Field(default_factory=DefaultCheckpointerArguments)
    distributed_training_args: DistributedTrainingArguments | None = None
    writers: Sequence[Any] = ("stdout",)
    stats_args: StatInitArguments = Field(default_factory=StatInitArguments)
    writer_args: WriterInitArguments = Field(default_factory=WriterInitArguments)
    disable_tqdm: bool = False
    log_level: str = "INFO"
    backend: str = "sp"
    amp_backend_native: bool = False
    amp_backend_apex: Literal[False] = False
    amp_level_apex: str = "O1"
    differential_privacy_args: None = None


class ModelArguments(Options):
    """Which model.

    Attributes:
        encoder_key: The attribute of the model that holds the encoder.
        hf_model: A hub id, where no folder is given.
        model_path: A folder with a model and its config, as ``save_pretrained`` writes it.
        model_wts_path: The same, by the name of the GLUE example.
        model_config_path: Accepted where it is the same folder.
        model_file: Accepted, and of no effect: transformers finds the file.
        model_config_file: The config's name.
        tokenizer_path: By default the model's folder.
        model_name: Accepted, and of no effect.
        num_labels: The number of classes; None for the config's.

    Example:
        >>> ModelArguments(model_path="runs/teacher").source
        'runs/teacher'
    """

    encoder_key: str = "bert"
    hf_model: str = "bert-base-uncased"
    model_path: str | None = None
    model_wts_path: str | None = None
    model_config_path: str | None = None
    model_file: str | None = None
    model_config_file: str = "config.json"
    tokenizer_path: str | None = None
    model_name: str | None = None
    num_labels: int | None = None

    @property
    def source(self) -> str:
        """Where the model is loaded from.

        Raises:
            ValueError: its config lies elsewhere.
        """
        folder = self.model_path or self.model_wts_path
        if folder and self.model_config_path and Path(folder) != Path(self.model_config_path):
            raise ValueError(
                f"the model lies in {folder!r} and its config in {self.model_config_path!r}; put them together"
            )
        return folder or self.hf_model


class ModuleInterfaceArguments(Options):
    """How a recipe trains.

    Attributes:
        max_lr: The largest learning rate.
        warmup_prop: The share of the steps in which it rises.
        metric: ``"acc"``, ``"acc_and_f1"``, ``"pcc_and_scc"`` or ``"mcc"``.
        has_labels: Whether the validation data has labels.
        max_seq_len: Tokens of a text.
        pad_label_id: The label of tokens that do not count.
        label_all_tokens: Whether all tokens of a word have its label, and not only the first.
        output_dir: Where the model goes at the end; None for nowhere.
        model_args: Which model.

    Example:
        >>> ModuleInterfaceArguments(max_lr=1e-4).warmup_prop
        0.1
    """

    max_lr: float = 4e-5
    warmup_prop: float = 0.1
    metric: Literal["acc", "acc_and_f1", "pcc_and_scc", "mcc"] = "acc"
    has_labels: bool = True
    max_seq_len: int = 128
    pad_label_id: int = -100
    label_all_tokens: bool = False
    output_dir: str | None = None
    model_args: ModelArguments = Field(default_factory=ModelArguments)


def as_list(text: Any) -> Any:
    """The entries of a list that is written as ``[0, 6, 11]``, ``0,6,11`` or ``0-6-11``; nothing is evaluated.

    Example:
        >>> as_list("[logits-attentions]"), as_list("[-1, -2]"), as_list("-1")
        (['logits', 'attentions'], [-1, -2], [-1])
    """
    if not isinstance(text, str):
        return text
    body = text.strip().removeprefix("[").removesuffix("]").strip()
    separator = "," if "," in body or body.startswith("-") else "-"
    return [yaml.safe_load(part) for part in body.split(separator)] if body else []


LossType = Literal["logits", "labels", "hidden_states", "attentions"]
Listed = BeforeValidator(as_list)


class DistillationArguments(Options):
    """What is distilled into what; the section ``distill`` of a YAML file.

    Lists may be written as text, ``"[0-6-11]"``.

    Attributes:
        enable: Whether a plugin distils.
        student_model_path: The folder of a student; by default it is made of the teacher's layers.
        student_layers: Which of the teacher's layers the student is made of and learns from, counted from 0; none
            for all. A student with a folder of its own learns from so many layers as it has.
        loss_types: Any of ``"logits"``, ``"labels"``, ``"hidden_states"``, ``"attentions"``.
        loss_weights: One for each.
        temperature: Of the logits.
        scale_loss_by_temp: Multiply the loss of the logits by the temperature squared.
        width_shrinkage: The share of heads, and so of the hidden size, and of feed-forward units that a student
            made of the teacher keeps, as in PyMarlin's GLUE example; 0 for all.
        student_model_config_path: Accepted where it is `student_model_path`.
        student_model_config_file: Accepted, and of no effect.
        student_model_file: Accepted, and of no effect.

    Raises:
        ValueError: an unknown loss, not one weight for each, or a temperature that is not positive.

    Example:
        >>> DistillationArguments(student_layers="[0-2]", loss_types=["logits", "labels"], loss_weights="1-0.5")
        DistillationArguments(...student_layers=[0, 2], ...loss_weights=[1.0, 0.5], ...)
    """

    enable: bool = False
    student_model_config_path: str | None = None
    student_model_config_file: str | None = None
    student_model_path: str | None = None
    student_model_file: str | None = None
    student_layers: Annotated[Sequence[int], Listed] = (0, 6, 11)
    loss_types: Annotated[Sequence[LossType], Listed] = ("logits",)
    loss_weights: Annotated[Sequence[float], Listed] = (1.0,)
    temperature: PositiveFloat = 1.0
    scale_loss_by_temp: bool = False
    width_shrinkage: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_weight_for_each(self) -> DistillationArguments:
        kinds, weights = len(self.loss_types), len(self.loss_weights)
        if kinds != weights or not kinds:
            raise ValueError(f"there are {kinds} loss_types and {weights} loss_weights; give one weight for each")
        return self


class CustomArgParser:
    """Reads ``--config_path file.yaml`` and, over it, ``--section.key value`` for the keys that the file has.

    Values are read as the file's own are: a list as ``[0,6,11]``, ``0,6,11`` or ``0-6-11``, a truth value also by
    the key alone. ``--params`` takes several at once, ``'{"--section.key": "value"}'``.

    Args:
        yaml_file_arg_key: What the option for the file is called.
        default_yamlfile: The file without that option.
        log_level: Accepted, and of no effect.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "config.yaml"
        >>> _ = file.write_text("distill: {temperature: 1, student_layers: [0, 6, 11]}")
        >>> CustomArgParser(default_yamlfile=str(file)).parse(["--distill.student_layers", "0-2"])
        {'distill': {'temperature': 1, 'student_layers': [0, 2]}}
    """

    def __init__(
        self,
        yaml_file_arg_key: str = "config_path",
        default_yamlfile: str = "config.yaml",
        log_level: str = "INFO",
    ) -> None:
        self.parser = argparse.ArgumentParser(allow_abbrev=False)
        self.parser.add_argument(f"--{yaml_file_arg_key}", dest="file", type=Path, default=default_yamlfile)
        self.parser.add_argument("--params", type=json.loads, default={})

    def parse(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Read the file and what overrides it; a mistake ends the program with one line.

        Args:
            arguments: By default those of the command line.

        Raises:
            ValueError: there is no such file.
            SystemExit: an option that the file does not have, or a value of another kind.
        """
        known, others = self.parser.parse_known_args(arguments)
        changes = [*others, *(f"{option}={value}" for option, value in known.params.items())]
        return change_values(read_yaml(known.file), changes, readers={list: as_list})
