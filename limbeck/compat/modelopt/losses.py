"""ModelOpt's losses, each one of limbeck's with ModelOpt's arguments and names of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.compat.modelopt.config import ConfigError, number
from limbeck.losses import LOSSES
from limbeck.reduce import masked_mean
from limbeck.registry import nearest
from limbeck.taps import read_output
from limbeck.types import IGNORE_INDEX

REDUCTIONS = ("mean", "batchmean", "sum", "none")


def logits_of(output: Any) -> Tensor:
    """The tensor itself, the first of several, or the logits of a model's output.

    Raises:
        ConfigError: an output without logits.

    Example:
        >>> logits_of({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, (tuple, list)):
        return logits_of(output[0])
    if isinstance(output, Tensor):
        return output
    named = read_output(output)
    if "logits" not in named:
        raise ConfigError(f"the output has no 'logits' to compare; {nearest('logits', named)}")
    return logits_of(named["logits"])


class LogitsDistillationLoss(nn.Module):
    """`forward_kl`, on logits or on the outputs of models.

    Args:
        temperature: T, softens both sides; the value carries T².
        reduction: ``"mean"`` over positions, ``"batchmean"`` (the sum by the number of examples), ``"sum"``, or
            ``"none"``.
        vocab_size: How many classes count, from the first; for models of which one has a padded vocabulary.
        correct: False divides ``"mean"`` by the number of classes too, as ModelOpt does.

    Raises:
        ConfigError: an unknown reduction, or a number out of range.
        TypeError: what is no number.

    Example:
        >>> LogitsDistillationLoss()(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])).item()
        0.327...
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "mean",
        vocab_size: int | None = None,
        *,
        correct: bool = True,
    ) -> None:
        super().__init__()
        self._temperature, self._reduction = number("temperature", temperature, 0), _checked(reduction)
        self._vocab_size, self._correct = vocab_size, correct

    @property
    def temperature(self) -> float:
        """T."""
        return self._temperature

    def forward(self, logits_s: Any, logits_t: Any) -> Tensor:
        """Compare logits (..., C): a scalar, or one value per position (...) where nothing is reduced."""
        student, teacher = (logits_of(side)[..., : self._vocab_size] for side in (logits_s, logits_t))
        values = LOSSES.get("forward_kl")(student, teacher.detach(), temperature=self._temperature)
        return _reduced(values, self._reduction, None, 1 if self._correct else student.shape[-1])


LMLogitsLoss = LogitsDistillationLoss


class MFTLoss(nn.Module):
    """`mft`, on logits or on the outputs of models; positions with the label -100 do not count.

    Args:
        temperature: T, softens both sides; the value carries T².
        threshold: By how much the label is to lead.
        reduction: ``"batchmean"`` and ``"mean"`` over positions that count, ``"sum"``, or ``"none"``.
        correct: False divides ``"mean"`` by the number of classes too, as ModelOpt does.

    Raises:
        ConfigError: an unknown reduction, or a number out of range.
        TypeError: what is no number.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0]])
        >>> MFTLoss()(torch.tensor([[0.0, 0.0]]), teacher, labels=torch.tensor([1])).item()
        0.020...
    """

    def __init__(
        self,
        temperature: float = 1.0,
        threshold: float = 0.2,
        reduction: str = "batchmean",
        *,
        correct: bool = True,
    ) -> None:
        super().__init__()
        self._temperature, self._threshold = number("temperature", temperature, 0), number("threshold", threshold)
        self._reduction, self._correct = _checked(reduction), correct

    def forward(self, logits_s: Any, logits_t: Any, labels: Tensor | None = None) -> Tensor:
        """Compare logits (..., C) with labels (...,): a scalar, or one value for each of all positions, (N,).

        Raises:
            TypeError: there are no labels.
        """
        if labels is None:
            raise TypeError("MFTLoss needs labels, and got none; call compute_kd_loss(labels=labels)")
        student, teacher = (side.flatten(0, -2) for side in map(logits_of, (logits_s, logits_t)))
        labels = labels.flatten()
        options = {"threshold": self._threshold, "temperature": self._temperature}
        values = LOSSES.get("mft")(student, teacher.detach(), labels=labels, **options)
        reduction = "mean" if self._reduction == "batchmean" else self._reduction
        classes = student.shape[-1] if self._reduction == "mean" and not self._correct else 1
        return _reduced(values, reduction, labels != IGNORE_INDEX, classes)


class MGDLoss(nn.Module):
    """`mgd` as a mean of squares, with what it trains: an alignment of channels and a generator.

    Args:
        num_student_channels: Channels of the student's map.
        num_teacher_channels: Channels of the teacher's map.
        alpha_mgd: Factor of the value.
        lambda_mgd: Which share of positions is masked on average.

    Raises:
        ConfigError: channels or a share out of range.

    Example:
        >>> loss = MGDLoss(2, 3)
        >>> loss(torch.ones(4, 2, 5, 5), torch.ones(4, 3, 5, 5)).shape, sorted(loss.state_dict())[0]
        (torch.Size([]), 'align.bias')
    """

    def __init__(
        self,
        num_student_channels: int,
        num_teacher_channels: int,
        alpha_mgd: float = 1.0,
        lambda_mgd: float = 0.65,
    ) -> None:
        super().__init__()
        self._alpha_mgd, self._lambda_mgd = alpha_mgd, lambda_mgd
        for channels in (num_student_channels, num_teacher_channels):
            if not isinstance(channels, int) or channels < 1:
                raise ConfigError(f"a number of channels is a whole number of at least 1, got {channels!r}")
        if not 0 <= number("lambda_mgd", self._lambda_mgd) <= 1:
            raise ConfigError(f"lambda_mgd is a share from 0 to 1, got {lambda_mgd}")
        same = num_student_channels == num_teacher_channels
        self.align = nn.Identity() if same else nn.Conv2d(num_student_channels, num_teacher_channels, 1)
        self.generation = nn.Sequential(
            nn.Conv2d(num_teacher_channels, num_teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(num_teacher_channels, num_teacher_channels, 3, padding=1),
        )

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        """Compare maps (B, C_student, H, W) and (B, C_teacher, H, W); a scalar.

        Raises:
            ConfigError: what is no map, or maps of different heights or widths.
        """
        if out_s.ndim != 4 or out_t.ndim != 4:
            shapes = f"{tuple(out_s.shape)} and {tuple(out_t.shape)}"
            raise ConfigError(f"MGD compares maps (B, C, H, W), got {shapes}; tap other layers")
        if out_s.shape[-2:] != out_t.shape[-2:]:
            sizes = tuple(out_s.shape[-2:]), tuple(out_t.shape[-2:])
            raise ConfigError(f"MGD compares maps of one size, got {sizes[0]} and {sizes[1]}; tap other layers")
        drawn = torch.rand(len(out_t), 1, *out_t.shape[-2:], device=out_s.device)
        kept = (drawn <= 1 - self._lambda_mgd).to(out_s.dtype)
        generated = self.generation(self.align(out_s) * kept)
        values = LOSSES.get("mgd")(generated, out_t, alpha=self._alpha_mgd / out_t[0].numel())
        return masked_mean(values)


def _checked(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ConfigError(f"unknown reduction {reduction!r}; {nearest(reduction, REDUCTIONS)}")
    return reduction


def _reduced(values: Tensor, reduction: str, counts: Tensor | None, classes: int) -> Tensor:
    if reduction == "mean":
        return masked_mean(values, counts) / classes
    if reduction == "none":
        return values
    return values.sum() / (len(values) if reduction == "batchmean" else 1)
