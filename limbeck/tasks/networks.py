"""Image models by name: ``transformers:resnet`` with the options of its configuration, ``timm:resnet18``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from limbeck.pretrained import first_line
from limbeck.registry import nearest
from limbeck.tasks.base import Loaded, Task
from limbeck.tasks.image import ImageTask
from limbeck.tasks.pictures import PictureTask
from limbeck.tasks.pixels import Pixels, from_config

IMAGE_SIZE = "image_size"


def named_network(source: str) -> Callable[..., Loaded] | None:
    """What makes a model that is named by its library; None for any other source.

    Example:
        >>> named_network("transformers:resnet") is None, named_network("my.module:network") is None
        (False, True)
    """
    library, _, name = source.partition(":")
    return partial(LIBRARIES[library], name) if library in LIBRARIES else None


def transformers_network(name: str, task: Task, *, processor: Pixels | None = None, **options: Any) -> Loaded:
    """An image classifier of transformers with random weights.

    Args:
        name: The model type in transformers: resnet, vit, convnext, ...
        task: What its head is for.
        processor: What another model reads, which this one shall read too.
        **options: Of the configuration: depths, hidden_sizes, ...

    Raises:
        ValueError: no such type, or values that make no model.
        TypeError: an option that the configuration does not have.
    """
    from transformers import AutoModelForImageClassification

    pixels = processor or _own_pixels(task, f"transformers:{name}")
    make = _configuration(name)
    known = set(make().to_dict())
    for option in options:
        if option not in known:
            raise TypeError(f"transformers:{name} has no option {option!r}; {nearest(option, known)}")
    if IMAGE_SIZE in known and pixels is not None:
        options = {IMAGE_SIZE: pixels.size, **options}
    names = dict(enumerate(task.labels))
    try:
        config = make(id2label=names, label2id={label: i for i, label in names.items()}, **options)
        model = AutoModelForImageClassification.from_config(config)
    except Exception as error:  # configurations check their values each in their own way
        raise ValueError(f"transformers:{name} cannot be made with {options}: {first_line(error)}") from None
    return Loaded(model, pixels, head_is_trained=False)


def _configuration(name: str) -> Any:
    """The class of a configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    if name not in KNOWN:
        raise ValueError(f"transformers has no image classifier {name!r}; {nearest(name, KNOWN)}")
    return CONFIG_MAPPING[name]


def timm_network(name: str, task: Task, *, processor: Pixels | None = None, **options: Any) -> Loaded:
    """An image classifier of timm; with ``pretrained: true`` its body is, and its head is new.

    Args:
        name: Its name in timm.
        task: What its head is for.
        processor: What another model reads, which this one shall read too.
        **options: Of ``timm.create_model``.

    Raises:
        ValueError: timm is not installed, or makes no such model.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"timm:{name} needs timm ({first_line(error)}); install it: pip install 'limbeck[vision]'"
        ) from None
    pixels = processor or _own_pixels(task, f"timm:{name}")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; {nearest(name, timm.list_models())}")
    try:
        model = timm.create_model(name, num_classes=len(task.labels), **options)
    except Exception as error:  # its models check their options each in their own way
        raise ValueError(f"timm:{name} cannot be made with {options}: {first_line(error)}") from None
    if options.get("pretrained"):
        pixels = _pretrained_pixels(timm.data.resolve_model_data_config(model), name).at(
            getattr(task, "size", None)
        )
    return Loaded(model, pixels, head_is_trained=False)


def _pretrained_pixels(config: Mapping[str, Any], name: str) -> Pixels:
    """What timm says of the images that a model was trained on."""
    side = config["input_size"][-1]
    return from_config(
        {
            "size": {"shortest_edge": round(side / config["crop_pct"])},
            "do_center_crop": True,
            "crop_size": side,
            "image_mean": config["mean"],
            "image_std": config["std"],
            "resample": {"bilinear": 2, "bicubic": 3}.get(config["interpolation"], 3),
        },
        f"timm:{name}",
    )


def _own_pixels(task: Task, source: str) -> Pixels | None:
    """What a model reads that was trained on nothing yet."""
    if not isinstance(task, (PictureTask, ImageTask)):
        raise ValueError(f"{source} reads images, and the task {task.name} has none; take another model or task")
    return task.pixels if isinstance(task, PictureTask) else None


LIBRARIES: dict[str, Callable[..., Loaded]] = {"transformers": transformers_network, "timm": timm_network}
