"""What several processes need to train as one, and what one process needs to leave nothing behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from limbeck.distiller import Distiller
from limbeck.stopwatch import Stopwatch
from limbeck.train.checkpoint import random_state, set_random_state
from limbeck.train.settings import Settings
from limbeck.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_accelerator(settings: Settings, folder: Path | None) -> Accelerator:
    """Start accelerate for devices and ranks alone.

    Precision, accumulation and compilation are this package's own: what `accelerate config` or ``ACCELERATE_*``
    variables say of them is overruled, for a training must not depend on the environment it runs in.

    Raises:
        ValueError: a tracker that accelerate does not know or that is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    _check_trackers(settings.trackers)
    return Accelerator(
        mixed_precision="no",
        # As a number it would be overruled by the environment, as a plugin it is not.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dynamo_backend="no",
        log_with=settings.trackers or None,
        project_dir=folder,
    )


def _check_trackers(names: list[str]) -> None:
    """Accelerate leaves out, without a word, a tracker that it knows but does not find installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name in LOGGER_TYPE_TO_CLASS and name not in installed:
            package = "limbeck[tensorboard]" if name == "tensorboard" else name
            raise ValueError(f"tracker {name!r} is not installed; pip install {package}")


def any_without_gradient(distiller: Distiller, batch: Batch) -> bool:
    """Whether some trained parameter gets no gradient: DDP waits for it in vain unless it is told.

    With stages that is so at one time or another.

    The model runs as it does in training, dropped layers and all; its statistics and the random generators are
    put back afterwards.
    """
    if distiller.has_stages:
        return True
    trained = [p for p in distiller.parameters() if p.requires_grad]
    modes = {module: module.training for module in distiller.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in distiller.buffers()]
    random, watch = random_state(), distiller.teacher_watch
    distiller.teacher_watch = Stopwatch()
    try:
        distiller.train()
        with torch.compiler.set_stance("force_eager"):
            gradients = torch.autograd.grad(distiller.distil(batch, progress=0.0).loss, trained, allow_unused=True)
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
        set_random_state(random)
        distiller.teacher_watch = watch
    return any(gradient is None for gradient in gradients)


def share_signals(accelerator: Accelerator, distiller: Distiller) -> None:
    """Let each rank know what the others' teachers said; called between epochs, where all are at one place."""
    if accelerator.num_processes > 1:
        distiller.keep()
        accelerator.wait_for_everyone()
        distiller.share()


class Interrupts:
    """Ctrl-C or a polite kill: noted, and acted on after the step at hand; a second one ends the process at once.

    Attributes:
        asked: Whether this process was told to end. Ranks are told one by one, hence what they do must depend on
            what they agreed on, never on this.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals inside the block; only in the main thread, since Python allows no handlers elsewhere."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: object) -> None:
            self.asked = True
            signal.signal(number, before[number])

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
