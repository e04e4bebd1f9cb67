"""What several processes need to train as one, and what one process needs to leave nothing behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from limbeck.distiller import Distiller
from limbeck.stopwatch import Stopwatch
from limbeck.train.checkpoint import first_spoiled, random_state, set_random_state
from limbeck.train.data import Step
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
    from accelerate.utils import GradientAccumulationPlugin, get_int_from_env

    _check_trackers(settings.trackers)
    return Accelerator(
        # Without this, several processes on a machine without accelerators would not know of each other.
        cpu=get_int_from_env(["WORLD_SIZE"], 1) > 1 and not torch.accelerator.is_available(),
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


def cut_batch(size: int, *, ranks: int = 1, most: int | None = None) -> tuple[int, int]:
    """Cut the examples of an update into equal micro-batches.

    Args:
        size: Examples of an update, over all ranks.
        ranks: Their number.
        most: Examples that fit a device at once; None for any number.

    Returns:
        The examples of a micro-batch, and the number of micro-batches of a rank.

    Raises:
        ValueError: the ranks cannot share them equally.

    Example:
        >>> cut_batch(32, most=8), cut_batch(10, most=4), cut_batch(12, ranks=2, most=5)
        ((8, 4), (2, 5), (3, 2))
    """
    if size % ranks:
        raise ValueError(f"{ranks} ranks cannot share a batch of {size}; take a multiple of {ranks}")
    share = size // ranks
    part = next(n for n in range(min(share, most or share), 0, -1) if share % n == 0)
    return part, share // part


class Placement(Protocol):
    """How the weights of a training lie on its ranks, and what depends on that.

    Attributes:
        distiller: What trains on this rank.
        model: What is called in training; it calls the Distiller.
        optimizer: Updates what this rank keeps.
    """

    distiller: Distiller
    model: Any
    optimizer: torch.optim.Optimizer

    @property
    def evaluated(self) -> Callable[..., Any] | None:
        """Calls the student where calling it directly would not do, or None."""
        ...

    def part(self, last: bool) -> AbstractContextManager[None]:
        """One micro-batch, forward and backward; gradients are exchanged in the last of a step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        ...

    def step(self, scaler: torch.amp.GradScaler, clip: float | None) -> None:
        """Clip by the norm of the whole gradient, and update."""
        ...

    def spoiled(self) -> str | None:
        """The name of a parameter that is no longer finite, or None; the same on all ranks."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict; every rank takes part."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` gave."""
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state with whole tensors; every rank takes part."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `optimizer_state` gave."""
        ...

    def finish(self) -> Distiller:
        """The user's Distiller with the trained weights; every rank takes part."""
        ...


class Replicated:
    """Weights that are whole on each rank: one process, or several by DDP; see `Placement`.

    Args:
        distiller: What is trained, in place.
        settings: How it is trained.
        accelerator: The training's ranks.
        samples: Small batches, one of each task.
    """

    evaluated = None

    def __init__(
        self, distiller: Distiller, settings: Settings, accelerator: Accelerator, samples: Sequence[Batch]
    ) -> None:
        self.distiller = distiller
        self.accelerator = accelerator
        if settings.compile:
            distiller.compile_student()
        if accelerator.num_processes > 1:
            from accelerate import DistributedDataParallelKwargs

            unused = any(any_without_gradient(distiller, sample) for sample in samples)
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
        optimizer = settings.build_optimizer(distiller.student, distiller.objective)
        self.model, self.optimizer = accelerator.prepare(distiller, optimizer)

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients in the last micro-batch alone."""
        context: AbstractContextManager[None] = nullcontext() if last else self.accelerator.no_sync(self.model)
        return context

    def backward(self, loss: Tensor) -> None:
        """Compute gradients; DDP averages them over the ranks."""
        self.accelerator.backward(loss)

    def step(self, scaler: torch.amp.GradScaler, clip: float | None) -> None:
        """Clip and update; a scaler leaves a step out whose gradients are not finite."""
        if clip is not None:
            scaler.unscale_(self.optimizer)
            self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()

    def spoiled(self) -> str | None:
        """Look at this rank's own, since all are alike."""
        return first_spoiled(self.distiller)

    def weights(self) -> dict[str, Tensor]:
        """The state dict."""
        return self.distiller.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load a state dict."""
        self.distiller.load_state_dict(weights)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's own."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load the optimizer's own."""
        self.optimizer.load_state_dict(dict(state))

    def finish(self) -> Distiller:
        """Take DDP off."""
        self.model = self.accelerator.unwrap_model(self.model)
        return self.distiller


def place(
    distiller: Distiller, settings: Settings, accelerator: Accelerator, samples: Sequence[Batch]
) -> Placement:
    """Lay the weights of a training on its ranks, as ``accelerate launch`` was told.

    Raises:
        ValueError: what does not go with weights that are cut, or with DeepSpeed's engine.
    """
    if accelerator.num_processes > 1:
        from accelerate.utils import parse_flag_from_env

        from limbeck.train.sharded import Sharded, sharding
        from limbeck.train.zero import Engine

        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            return Engine(distiller, settings, accelerator)
        plugin = sharding()
        if plugin is not None:
            return Sharded(distiller, settings, plugin, accelerator)
    return Replicated(distiller, settings, accelerator, samples)


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


def global_counts(distiller: Distiller, step: Step, world: int, device: torch.device) -> dict[str, float]:
    """Valid positions of a whole step, over its micro-batches and all ranks, divided by the number of ranks.

    Gradients are averaged over ranks, hence the division: the sum of the parts is then one loss of the whole step.

    Args:
        distiller: Whose terms they are counted for.
        step: This rank's part.
        world: The number of ranks, of torch's default process group; each calls this.
        device: Where ranks exchange numbers.
    """
    totals: dict[str, float] = {}
    for batch in step.micro_batches:
        for key, count in distiller.count(batch).items():
            totals[key] = totals.get(key, 0.0) + count * step.share
    if world > 1:
        everywhere = torch.tensor([totals[key] for key in sorted(totals)], device=device)
        torch.distributed.all_reduce(everywhere)
        totals = {key: count / world for key, count in zip(sorted(totals), everywhere.tolist(), strict=True)}
    return {key: max(count, 1.0 / world) for key, count in totals.items()}


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


def process_state(several: bool) -> Any:
    """This process among those that were started, and its device.

    Args:
        several: Whether this may be one of several.

    Raises:
        ValueError: several processes were started, and only one may be.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())  # else it starts one alone on a CPU
    if state.num_processes > 1 and not several:
        raise ValueError(
            f"a run is one process, and {state.num_processes} were started; for several ranks call limbeck.fit"
        )
    return state
