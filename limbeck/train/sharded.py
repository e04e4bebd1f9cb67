"""Training with weights that are cut over the ranks (FSDP2).

The student that the user gave is never cut. A twin of the Distiller is, it trains, and at the end its weights are
gathered and put into the original. So the student stays the object that went in, of its own class, and nothing
has to be undone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from limbeck.distiller import Distiller
from limbeck.registry import nearest
from limbeck.teachers import ModuleTeacher, within
from limbeck.teachers.base import Stateful
from limbeck.train.settings import Settings
from limbeck.types import Output

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

# FSDP2 looks for tensors in what a module returns, to know when their gradients come. In a dataclass it finds them
# from torch 2.13 on, before that in what is registered here.
_pytree.register_pytree_node(
    Output,
    lambda output: ([getattr(output, f.name) for f in fields(output)], None),
    lambda values, _: Output(*values),
)


def sharding() -> FullyShardedDataParallelPlugin | None:
    """What ``accelerate launch --use_fsdp`` was told; None where weights stay whole.

    It is read as accelerate reads it, which itself leaves it out on CPUs.

    Raises:
        ValueError: FSDP's first version, or an option that is left to the model.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(f"weights are cut by FSDP2, not {plugin.fsdp_version}; launch with --fsdp_version 2")
    if plugin.activation_checkpointing:
        raise ValueError(
            "activation checkpointing is the model's own; leave --fsdp_activation_checkpointing out and call "
            "student.gradient_checkpointing_enable({'use_reentrant': False})"
        )
    return plugin


class Sharded:
    """Weights that are cut over all ranks by FSDP2; see `limbeck.train.ranks.Placement`.

    All ranks begin with the weights of rank 0. Each module of a class that the launch names, or with
    ``TRANSFORMER_BASED_WRAP`` of the student's own ``_no_split_modules``, is gathered and freed by itself; all
    else is gathered for the whole step.

    Args:
        distiller: What is to be trained, with projections that have their sizes. It stays as it is until `finish`;
            `Sharded.distiller` is its twin, which trains.
        settings: How it is trained.
        plugin: From `sharding`.
        accelerator: The training's ranks.

    Raises:
        ValueError: what needs whole weights in the middle of a training: measured gradients, half precision with a
            scale, a teacher that lives on the student's weights; stages; a class that the student has no module
            of.
    """

    def __init__(
        self,
        distiller: Distiller,
        settings: Settings,
        plugin: FullyShardedDataParallelPlugin,
        accelerator: Accelerator,
    ) -> None:
        _check(distiller, settings)
        self.original = distiller.to("cpu")
        self.distiller = copy.deepcopy(distiller, _same_teacher(distiller))
        if settings.compile:
            self.distiller.compile_student()
        for teacher in _modules_that_teach(distiller):
            _from_rank_0(teacher.module, accelerator.device)
        _from_rank_0(self.distiller, accelerator.device)
        _cut(self.distiller, plugin, accelerator)
        self.model: Any = self.distiller
        self.optimizer = settings.build_optimizer(self.distiller.student, self.distiller.objective)
        self.accelerator = accelerator

    def evaluated(self, *inputs: Any, **named: Any) -> Any:
        """Call the student by way of the whole, which gathers its weights; it is in eval mode already."""
        self.distiller.training = False
        try:
            return self.model(*inputs, **named)
        finally:
            self.distiller.training = True

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """One micro-batch, forward and backward; gradients are exchanged in the last of a step."""
        self.model.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        torch.autograd.backward(loss)

    def step(self, scaler: torch.amp.GradScaler, clip: float | None) -> None:
        """Clip by the norm over all ranks' shares, and update."""
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def spoiled(self) -> str | None:
        """The name of a parameter that is no longer finite on some rank, or None; every rank takes part."""
        names = [name for name, _ in self.distiller.named_parameters()]
        own = [torch.isfinite(_share(p)).all() for p in self.distiller.parameters()]
        bad = self.accelerator.reduce(1.0 - torch.stack(own).float(), "sum")
        return next((name for name, count in zip(names, bad.tolist(), strict=True) if count), None)

    def weights(self) -> dict[str, Tensor]:
        """The whole weights, on the CPU; tied ones are one tensor. Every rank takes part."""
        first = {id(p): name for name, p in self.distiller.named_parameters()}
        tied = {name: first[id(p)] for name, p in self.distiller.named_parameters(remove_duplicate=False)}
        found: dict[str, Tensor] = {}
        for name, tensor in self.distiller.state_dict().items():
            other = tied.get(name, name)
            found[name] = found[other] if other in found else _whole(tensor)
        return found

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over whole weights; every rank brings the same."""
        own = self.distiller.state_dict()
        cut = {name: _cut_like(tensor, own[name]) if name in own else tensor for name, tensor in weights.items()}
        self.distiller.load_state_dict(cut)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state with whole tensors; every rank takes part."""
        state = self.optimizer.state_dict()
        entries = {n: {k: _whole(v) for k, v in entry.items()} for n, entry in state["state"].items()}
        return {**state, "state": entries}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Take over a whole state; every rank brings the same."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        entries = {
            number: {name: _cut_like(value, parameters[number]) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": entries})

    def finish(self) -> Distiller:
        """Give the weights to the Distiller that the user has, on the CPU; every rank takes part."""
        self.original.load_state_dict(self.weights())
        self.original.teacher_watch = self.distiller.teacher_watch
        return self.original


def _check(distiller: Distiller, settings: Settings) -> None:
    """Refuse what needs whole weights in the middle of a training."""
    if settings.gradients_every is not None or distiller.objective.balance.every is not None:
        raise ValueError(
            "each term's gradient cannot be measured under FSDP2, where the student's weights are cut; leave out "
            "gradients_every and the balance 'gradient_norm', or train without --use_fsdp"
        )
    if distiller.has_stages:
        raise ValueError("stages do not go with FSDP2, which fixes what trains; train without --use_fsdp")
    if settings.precision == "fp16":
        raise ValueError("precision 'fp16' does not go with FSDP2; take 'bf16', or train without --use_fsdp")
    for _, teacher in within(distiller.teacher):
        if isinstance(teacher, Stateful):
            raise ValueError(
                f"the teacher {type(teacher).__name__} needs the student's whole weights, and FSDP2 cuts them; "
                "train without --use_fsdp"
            )


def _modules_that_teach(distiller: Distiller) -> list[ModuleTeacher]:
    return [teacher for _, teacher in within(distiller.teacher) if isinstance(teacher, ModuleTeacher)]


def _same_teacher(distiller: Distiller) -> dict[int, Any]:
    """What a copy of the Distiller shares with it: the teacher, and its parts that terms borrow."""
    kept: list[Any] = [teacher for _, teacher in within(distiller.teacher)]
    for teacher in _modules_that_teach(distiller):
        kept += teacher.module.modules()
    return {id(one): one for one in kept}


def _from_rank_0(module: nn.Module, device: torch.device) -> None:
    """Give all ranks the same weights, as DDP does; some launches load them on rank 0 alone."""
    for tensor in (*module.parameters(), *module.buffers()):
        moved = tensor.detach().to(device)
        torch.distributed.broadcast(moved, src=0)
        tensor.detach().copy_(moved)


def _cut(distiller: Distiller, plugin: FullyShardedDataParallelPlugin, accelerator: Accelerator) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    offload = CPUOffloadPolicy() if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else OffloadPolicy()
    chosen = _chosen(distiller.student, plugin)
    for module in reversed(list(distiller.student.modules())):  # inner ones first
        if chosen(module):
            free = plugin.reshard_after_forward
            fully_shard(module, mesh=mesh, offload_policy=offload, reshard_after_forward=free)
    fully_shard(distiller, mesh=mesh, offload_policy=offload)
    for buffer in distiller.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def _chosen(student: nn.Module, plugin: FullyShardedDataParallelPlugin) -> Callable[[nn.Module], bool]:
    """Which modules are gathered and freed by themselves."""
    smallest, named = plugin.min_num_params or 0, plugin.transformer_cls_names_to_wrap
    if smallest > 0:
        return lambda module: sum(p.numel() for p in module.parameters()) > smallest
    present = {type(module).__name__ for module in student.modules()}
    for name in named or ():
        if name not in present:
            raise ValueError(f"the student has no module of class {name!r} to cut; {nearest(name, present)}")
    if named is None and plugin.auto_wrap_policy is not None:
        named = getattr(student, "_no_split_modules", None)  # a model of transformers lists its layers' classes
    classes = set(named or ())
    return lambda module: type(module).__name__ in classes


def _share(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(value: Any) -> Any:
    """Gather a tensor if it is cut; every rank takes part."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor().detach().cpu() if isinstance(value, DTensor) else value


def _cut_like(value: Any, like: Tensor) -> Any:
    """A whole tensor, cut as another one of its shape is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
