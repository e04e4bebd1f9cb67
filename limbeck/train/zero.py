"""Training by DeepSpeed's engine, whose ZeRO cuts the optimizer's state, and gradients, over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.distiller import Distiller
from limbeck.train.checkpoint import first_spoiled
from limbeck.train.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine:
    """Weights that are whole on each rank, and an optimizer that is not; see `limbeck.train.ranks.Placement`.

    Of what ``accelerate launch --use_deepspeed`` was told, the part on ZeRO counts; clipping, precision and
    accumulation are the settings'.

    Args:
        distiller: What is trained, in place.
        settings: How it is trained.
        accelerator: The training's ranks.

    Raises:
        ValueError: ZeRO's third stage, which cuts the weights too; stages of the Distiller; half precision with a
            scale.
    """

    evaluated = None

    def __init__(self, distiller: Distiller, settings: Settings, accelerator: Accelerator) -> None:
        import deepspeed
        from accelerate.utils import DeepSpeedPlugin

        zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]  # as accelerate reads it for GPUs alone
        if zero["stage"] == 3:
            raise ValueError(
                "ZeRO's stage 3 is not for fit; take --zero_stage 2, or to cut the weights too FSDP2: accelerate "
                "launch --use_fsdp --fsdp_version 2"
            )
        if settings.precision == "fp16" or distiller.has_stages:
            what = "stages do" if distiller.has_stages else "precision 'fp16' does"
            raise ValueError(f"{what} not go with DeepSpeed here; train without --use_deepspeed")
        if settings.compile:
            distiller.compile_student()
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed insists on a number, and uses it for its log alone
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.clip or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        made = settings.build_optimizer(distiller.student, distiller.objective)
        self.distiller = distiller
        self.accelerator = accelerator
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=distiller, optimizer=made, config=config, dist_init_required=False
        )
        self.made = made

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """One micro-batch, forward and backward."""
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Compute gradients; the engine averages them over the ranks."""
        self.model.backward(loss)

    def step(self, scaler: torch.amp.GradScaler, clip: float | None) -> None:
        """Clip and update; both are the engine's."""
        self.model.step()

    def spoiled(self) -> str | None:
        """Look at this rank's own, since all are alike."""
        return first_spoiled(self.distiller)

    def weights(self) -> dict[str, Tensor]:
        """The state dict."""
        return self.distiller.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load a state dict, and tell the optimizer, which has a copy of its share."""
        self.distiller.load_state_dict(weights)
        if self.optimizer is not self.made:
            self.optimizer.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, Any]:
        """What each rank has of the optimizer's state, by its number; every rank takes part."""
        own = self.made.state_dict()
        parts: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(parts, own["state"])
        groups = [{**group, "params": []} for group in own["param_groups"]]
        return {"state": dict(enumerate(parts)), "param_groups": groups}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Take this rank's part."""
        own = {int(number): entry for number, entry in state["state"][self.accelerator.process_index].items()}
        now = self.made.state_dict()["param_groups"]
        groups = [
            {**group, "params": mine["params"]} for group, mine in zip(state["param_groups"], now, strict=True)
        ]
        self.made.load_state_dict({"state": own, "param_groups": groups})

    def finish(self) -> Distiller:
        """Take the engine off, and give each weight memory of its own again."""
        self.model.destroy()
        for parameter in self.distiller.parameters():
            parameter.data = parameter.data.clone()
            parameter.grad = None
        return self.distiller
