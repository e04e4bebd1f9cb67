"""Every block of Intel Extension for Transformers' page on distillation, with only its import lines changed.

Filled in: the dots of ``NLPTrainer(......)``, and the names that the page uses and nowhere makes: ``tune_metric``
(its first block makes ``metric``), ``teacher_model``, ``trainer``, ``criterion``, ``d_conf``.
"""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from limbeck.compat import itrex
from tests.hf_cases import arguments, padded, texts
from tests.models import bert

PAGE = (Path(__file__).parent / "itrex.md").read_text()
BLOCKS = [textwrap.dedent(code) for code in re.findall(r"^ *```python\n(.*?)^ *```$", PAGE, flags=re.M | re.S)]
DATA = "train_dataset=data, eval_dataset=data, data_collator=padded"
DOTS = f"model=student, args=args, compute_metrics=accuracy, {DATA}"

THEIRS = "from intel_extension_for_transformers.transformers"
IMPORTS = {
    f"{THEIRS} import metric, objectives, DistillationConfig, Criterion": (
        "from limbeck.compat.itrex import metric, objectives, DistillationConfig, Criterion"
    ),
    f"{THEIRS}.trainer import NLPTrainer": "from limbeck.compat.itrex import NLPTrainer",
    f"{THEIRS} import (DistillationConfig, metrics)": (
        "from limbeck.compat.itrex import (DistillationConfig, metrics)"
    ),
    f"{THEIRS}.distillation import Criterion": "from limbeck.compat.itrex import Criterion",
}


def changed(block):
    """A block with the import lines changed, all of which must be known."""
    lines = [IMPORTS.get(line, line) for line in block.splitlines()]
    assert not any("intel_extension" in line for line in lines)
    # What is behind ``#`` is the page's own note.
    return "\n".join(line if line.startswith("#") else line.replace("......", DOTS) for line in lines)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def names(tmp_path):
    """What a script around the blocks holds: models, data, and what other blocks make."""
    data = [{**text, "labels": text["input_ids"][0] % 3} for text in texts(count=16)]
    args = arguments(tmp_path, num_train_epochs=1, max_steps=-1)
    student, teacher = bert(1, 8, seed=1), bert(2, 16, seed=2)
    found = {"student": student, "teacher_model": teacher, "args": args, "data": data}
    found |= {"accuracy": accuracy, "padded": padded, "metrics": itrex.metrics, "Criterion": itrex.Criterion}
    found |= {"DistillationConfig": itrex.DistillationConfig, "NLPTrainer": itrex.NLPTrainer}
    found |= {"metric": itrex.metrics.Metric(name="eval_accuracy"), "criterion": itrex.Criterion()}
    found["tune_metric"] = found["metric"]
    found["d_conf"] = itrex.DistillationConfig(metrics=found["metric"], criterion=found["criterion"])
    return found


def with_trainer(names):
    exec(f"trainer = NLPTrainer({DOTS})", names)
    return names


def moved(names, before):
    return any(not torch.equal(a, b) for a, b in zip(names["student"].state_dict().values(), before, strict=True))


def weights(names):
    return [tensor.clone() for tensor in names["student"].state_dict().values()]


def test_the_page_has_six_blocks():
    assert len(BLOCKS) == 6


def test_pytorch_script(names):
    before = weights(names)
    exec(changed(BLOCKS[0]), names)
    assert names["model"] is names["student"] is names["trainer"].model
    assert moved(names, before)
    assert "eval_accuracy" in {key for line in names["trainer"].state.log_history for key in line}


def test_tensorflow_script_is_refused_in_one_line(names):
    with pytest.raises(ValueError, match="TFOptimization trains TensorFlow models"):
        exec(changed(BLOCKS[1]), {**names, "TFOptimization": itrex.TFOptimization})


def test_tensorflow_script_with_a_pytorch_trainer(names):
    """The same lines, where what they call TFOptimization makes an NLPTrainer."""
    before, made = weights(names), with_trainer(names)
    exec(changed(BLOCKS[1]), {**made, "TFOptimization": lambda *_: made["trainer"]})
    assert moved(names, before)


@pytest.mark.parametrize(("block", "name"), [(2, "metric"), (3, "criterion"), (4, "d_conf")])
def test_blocks_that_make_one_thing(names, block, name):
    made = names.pop(name)
    exec(changed(BLOCKS[block]), names)
    assert names[name] == made


def test_distill_with_trainer(names):
    before = weights(names)
    exec(changed(BLOCKS[5]), with_trainer(names))
    assert names["model"] is names["student"]
    assert moved(names, before)
