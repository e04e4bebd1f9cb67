"""Students: functions that make a smaller model from a trained one, and one model for several tasks."""

from limbeck.students.channels import shrink_channels
from limbeck.students.depth import take_layers
from limbeck.students.fresh import from_config
from limbeck.students.heads import Heads
from limbeck.students.lora import merged, with_lora
from limbeck.students.vocabulary import cut_tokenizer
from limbeck.students.width import narrower_sizes, shrink

__all__ = [
    "Heads",
    "cut_tokenizer",
    "from_config",
    "merged",
    "narrower_sizes",
    "shrink",
    "shrink_channels",
    "take_layers",
    "with_lora",
]
