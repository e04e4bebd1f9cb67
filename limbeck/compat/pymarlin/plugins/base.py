"""``Plugin``: data, module and trainer of a task, from one config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from limbeck.compat.pymarlin.core.data_interface import DataInterface
from limbeck.compat.pymarlin.core.module_interface import ModuleInterface
from limbeck.compat.pymarlin.core.trainer import Trainer
from limbeck.compat.pymarlin.core.trainer_arguments import TrainerArguments
from limbeck.compat.pymarlin.distillation import DistillationArguments, build_distill_module
from limbeck.compat.pymarlin.recipe import ModelArguments, ModuleInterfaceArguments
from limbeck.compat.pymarlin.utils.checkpointer.checkpoint_utils import DefaultCheckpointerArguments
from limbeck.compat.pymarlin.utils.config_parser.custom_arg_parser import CustomArgParser
from limbeck.compat.pymarlin.utils.stats import StatInitArguments
from limbeck.compat.pymarlin.utils.writer import WriterInitArguments
from limbeck.registry import nearest

SECTIONS = ("data", "model", "module", "distill", "trainer", "ckpt", "stats", "wrts")


class Plugin:
    """A task; its three classes are what another task has others of.

    Args:
        config: The sections ``data``, ``model``, ``module``, ``distill``, ``trainer``, ``ckpt``, ``stats`` and
            ``wrts``; by default from the YAML file of ``--config_path`` and the command line.

    Raises:
        ValueError: an unknown section.
        TypeError: an unknown key in one.
    """

    data_arguments: ClassVar[Callable[..., Any]]
    data_class: ClassVar[Callable[..., DataInterface]]
    module_class: ClassVar[type[ModuleInterface]]

    datainterface: DataInterface
    moduleinterface: ModuleInterface
    trainer: Trainer

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = CustomArgParser().parse() if config is None else config
        for name in config:
            if name not in SECTIONS:
                raise ValueError(f"the config has no section {name!r}; {nearest(name, SECTIONS)}")
        section = {name: dict(config.get(name) or {}) for name in SECTIONS}
        self.data_args = type(self).data_arguments(**section["data"])
        model_args = ModelArguments(**section["model"])
        self.module_args = ModuleInterfaceArguments(**section["module"], model_args=model_args)
        self.distill_args = DistillationArguments(**section["distill"])
        self.trainer_args = TrainerArguments(
            **section["trainer"],
            stats_args=StatInitArguments(**section["stats"]),
            writer_args=WriterInitArguments(**section["wrts"]),
            checkpointer_args=DefaultCheckpointerArguments(**section["ckpt"]),
        )

    def setup_datainterface(self) -> None:
        """Read the data."""
        self.datainterface = type(self).data_class(self.data_args)
        self.datainterface.setup_datasets()

    def setup_module(self) -> None:
        """Load the models; with ``distill.enable`` a teacher and its student."""
        if self.distill_args.enable:
            made: Any = build_distill_module(self.module_class)
            self.moduleinterface = made(self.distill_args, self.module_args, self.datainterface)
        else:
            own: Any = self.module_class
            self.moduleinterface = own(self.module_args, self.datainterface)

    def setup_trainer(self) -> None:
        """Make the trainer, and first what it trains."""
        if "moduleinterface" not in self.__dict__:
            self.setup_datainterface()
            self.setup_module()
        self.trainer = Trainer(module=self.moduleinterface, args=self.trainer_args)

    def setup(self, **kwargs: Any) -> Trainer:
        """All three; ``plugin.setup().train()``."""
        self.setup_datainterface()
        self.setup_module()
        self.setup_trainer()
        return self.trainer
