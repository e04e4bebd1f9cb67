"""A Distiller in Lightning: updates, checkpoints, evaluation, ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from limbeck import Distiller, Settings, Term, fit
from limbeck.teachers import Average
from tests.models import bert, perceptron, points
from tests.test_memory_ranks import free_port

lightning = pytest.importorskip("lightning.pytorch")

from limbeck.train.lightning import DistillationData, DistillationModule, SaveStudent  # noqa: E402

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning's, of a newer torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # It is the state after the update that is wanted.
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization.*"),
]
SETTINGS = Settings(batch_size=8, learning_rate=0.02, warmup=2, clip=0.5, seed=4)


def distiller(dropout=0.3, **options):
    student = nn.Sequential(nn.Dropout(dropout), *perceptron(5))
    terms = [
        Term("logits", loss="forward_kl", name="kd"),
        Term("3", "2", loss="mse", project="linear", weight=0.3, name="hidden"),
        Term("labels", loss="cross_entropy", weight=0.5),
    ]
    return Distiller(student, perceptron(9, seed=2), terms, **options)


def items(count=21):
    inputs, labels = points(count)
    return [{"input": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    kept = {"enable_checkpointing": "default_root_dir" in options}
    return lightning.Trainer(**{"accelerator": "cpu", "max_epochs": 3, **quiet, **kept, **options})


def by_fit(**changes):
    trained = distiller(changes.pop("dropout", 0.3))
    fit(trained, items(), items(), SETTINGS.model_copy(update={"epochs": 3, **changes}))
    return trained.state_dict()


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_with_its_data_it_trains_as_fit_does(accumulation):
    """Shuffled, with dropout, cut into parts, with a last batch that is short: bit for bit."""
    settings = SETTINGS.model_copy(update={"accumulation": accumulation})
    trained = distiller()
    trainer().fit(DistillationModule(trained, settings), datamodule=DistillationData(items(), items(), settings))
    assert same(trained.state_dict(), by_fit(accumulation=accumulation))


def test_batches_of_a_loader_are_gathered_to_updates():
    """Three batches make an update; of seven, the last one is alone."""
    settings = SETTINGS.model_copy(update={"accumulation": 3})
    parts, whole = distiller(0.0), distiller(0.0)
    trainer().fit(DistillationModule(parts, settings), DataLoader(items(), 3))
    trainer().fit(DistillationModule(whole, SETTINGS), DataLoader(items(), 9))
    weights = whole.state_dict()
    assert max(float((parts.state_dict()[n] - w).abs().max()) for n, w in weights.items()) < 1e-6
    assert not same(weights, distiller(0.0).state_dict())


def every(steps, folder):
    return lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_training_is_bit_for_bit_the_same(tmp_path, stop):
    """In the middle of an epoch (of three steps), and at its end; loaded without pickled code."""
    data = DistillationData(items(), items(), SETTINGS)
    trainer(default_root_dir=tmp_path, callbacks=[every(stop, tmp_path)]).fit(
        DistillationModule(distiller(), SETTINGS), datamodule=data
    )
    resumed, data = distiller(), DistillationData(items(), items(), SETTINGS)
    again = trainer(default_root_dir=tmp_path, callbacks=[every(stop, tmp_path)])
    module, path = DistillationModule(resumed, SETTINGS), tmp_path / f"step={stop}.ckpt"
    again.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    assert again.global_step == 9
    assert same(resumed.state_dict(), by_fit())


def test_a_checkpoint_holds_student_and_projections_and_no_teacher(tmp_path):
    trained = distiller(balance="uncertainty")
    running = trainer(default_root_dir=tmp_path)
    running.fit(DistillationModule(trained, SETTINGS), datamodule=DistillationData(items(), settings=SETTINGS))
    kept = torch.load(running.checkpoint_callback.best_model_path, weights_only=True)
    assert set(kept["state_dict"]) == {f"distiller.{name}" for name in trained.state_dict()}
    assert {name.split(".")[1] for name in kept["state_dict"]} == {"student", "objective"}
    path, other = running.checkpoint_callback.best_model_path, distiller(balance="uncertainty")
    DistillationModule.load_from_checkpoint(path, distiller=other, weights_only=True)
    assert same(other.state_dict(), trained.state_dict())


def test_a_teacher_that_changes_is_part_of_a_checkpoint(tmp_path):
    def averaged():
        student = perceptron()
        return Distiller(
            student, Average(student), [Term("logits", loss="mse"), Term("labels", loss="cross_entropy")]
        )

    whole, resumed = averaged(), averaged()
    data = DistillationData(items(), settings=SETTINGS)
    trainer(default_root_dir=tmp_path, callbacks=[every(4, tmp_path)]).fit(
        DistillationModule(whole, SETTINGS), datamodule=data
    )
    again = DistillationModule(resumed, SETTINGS)
    data = DistillationData(items(), settings=SETTINGS)
    running = trainer(default_root_dir=tmp_path, callbacks=[every(4, tmp_path)])
    running.fit(again, datamodule=data, ckpt_path=tmp_path / "step=8.ckpt", weights_only=True)
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(resumed.teacher.state()["weights"], whole.teacher.state()["weights"])


def test_validation_runs_the_student_alone():
    trained = distiller()
    asked = []
    trained.teacher.module.register_forward_hook(lambda *_: asked.append(1))
    running = trainer(max_epochs=1)
    running.fit(DistillationModule(trained, SETTINGS), DataLoader(items(8), 8), DataLoader(items(), 4))
    assert len(asked) == 2  # the check beforehand, and one step
    with torch.no_grad():
        student = trained.export().eval()
        right = sum(int(student(item["input"][None]).argmax() == item["labels"]) for item in items())
    assert float(running.callback_metrics["val/accuracy"]) == pytest.approx(right / 21)
    assert set(running.callback_metrics) == {
        "loss",
        "terms/kd",
        "terms/hidden",
        "terms/cross_entropy",
        "val/accuracy",
    }


def test_the_loss_that_is_logged_is_the_weighted_sum():
    running = trainer(max_epochs=1)
    running.fit(DistillationModule(distiller(), SETTINGS), datamodule=DistillationData(items(), settings=SETTINGS))
    found = {name: float(value) for name, value in running.callback_metrics.items()}
    weighted = found["terms/kd"] + 0.3 * found["terms/hidden"] + 0.5 * found["terms/cross_entropy"]
    assert found["loss"] == pytest.approx(weighted, rel=1e-5)


def text_items(count=12):
    return [{"input_ids": torch.tensor([5 + i % 3, 7, 9]), "labels": torch.tensor(i % 3)} for i in range(count)]


def test_the_best_student_is_kept_as_a_plain_folder(tmp_path):
    """By the score of each validation, which is made up here; the second one is best."""
    scores = iter([0.5, 0.9, 0.7])

    class Scored(DistillationModule):
        def on_validation_epoch_end(self):
            self.log("val/made_up", next(scores))

    student = bert(1, 8, seed=1)
    seen = []

    class Note(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(student.classifier.weight.detach().clone())

    distiller = Distiller(student, bert(2, 16, seed=2), [Term("logits", loss="forward_kl")])
    save = SaveStudent(tmp_path / "best", monitor="val/made_up", mode="max")
    loader = DataLoader(text_items(), 4)
    running = trainer(callbacks=[Note(), save], num_sanity_val_steps=0)
    running.fit(Scored(distiller, SETTINGS, metric=None), loader, loader)
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best")
    assert torch.equal(kept.classifier.weight, seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert save.state_dict() == {"best": pytest.approx(0.9)}
    assert "distiller" not in json.loads((tmp_path / "best" / "config.json").read_text())


def test_a_student_of_another_kind_is_kept_by_its_weights(tmp_path):
    trained = distiller(0.0)
    data = DistillationData(items(), items(), SETTINGS)
    trainer(max_epochs=1, callbacks=[SaveStudent(tmp_path)]).fit(
        DistillationModule(trained, SETTINGS), datamodule=data
    )
    assert same(load_file(tmp_path / "student.safetensors"), trained.export().state_dict())


def test_half_precision_is_the_trainers():
    dtypes = []
    trained = distiller()
    trained.student[1].register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    data = DistillationData(items(), settings=SETTINGS)
    trainer(max_epochs=1, precision="bf16-mixed").fit(DistillationModule(trained, SETTINGS), datamodule=data)
    assert set(dtypes[1:]) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trained.parameters())


def test_optimizer_and_rates_of_ones_own():
    class Own(DistillationModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            rates = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "epoch"}}

    running = trainer()
    running.fit(Own(distiller(), SETTINGS), datamodule=DistillationData(items(), settings=SETTINGS))
    assert running.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 5}, r"epochs is not a setting of a module in Lightning; pass Trainer\(max_epochs\)"),
        ({"precision": "bf16"}, r"pass Trainer\(precision, such as 'bf16-mixed'\)"),
        ({"gradients_every": 2}, "gradients_every is measured by limbeck.fit alone; leave it out"),
    ],
)
def test_settings_of_the_trainer_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationModule(distiller(), Settings(**settings))


def test_a_training_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"schedules need an end; pass Trainer\(max_epochs=...\)"):
        trainer(max_epochs=-1).fit(DistillationModule(distiller(), SETTINGS), DataLoader(items(), 8))


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_what_cannot_be_trained_is_refused():
    with pytest.raises(TypeError, match="what trains is a Distiller, got a Sequential"):
        DistillationModule(perceptron())
    with pytest.raises(TypeError, match=r"settings are limbeck.Settings, got a dict"):
        DistillationModule(distiller(), {"learning_rate": 0.1})
    with pytest.raises(ValueError, match="the training loader is empty; check its data set and drop_last"):
        trainer(max_epochs=1).fit(DistillationModule(distiller(), SETTINGS), DataLoader([], 8))


def test_a_wrong_monitor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mode is 'max' or 'min', and goes with monitor; got None with 'loss'"):
        SaveStudent(tmp_path, monitor="loss")
    loader = DataLoader(items(), 8)
    running = trainer(callbacks=[SaveStudent(tmp_path, monitor="val/acc", mode="max")])
    with pytest.raises(ValueError, match=r"SaveStudent found no score 'val/acc'; logged are \[.*'val/accuracy'\]"):
        running.fit(DistillationModule(distiller(), SETTINGS), loader, loader)


def test_two_ranks_update_as_one(tmp_path):
    """With fit's data, accumulation, and a last batch of fewer examples on one rank than on the other."""
    command = [sys.executable, "-m", "tests.workers.lightning_ranks", str(tmp_path / "two.safetensors")]
    environment = {**os.environ, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=200, capture_output=True)
    two, one = load_file(tmp_path / "two.safetensors"), by_fit(dropout=0.0, accumulation=2)
    assert max(float((two[name] - one[name]).abs().max()) for name in one) < 1e-6
    score = json.loads((tmp_path / "two.json").read_text())
    alone = distiller(0.0)
    alone.load_state_dict(two)
    right = sum(int(alone.student.eval()(i["input"][None]).argmax() == i["labels"]) for i in items())
    assert score["val/accuracy"] == pytest.approx(right / 21)
