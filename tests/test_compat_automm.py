"""AutoMM's door: its names and argument shapes, and every correction that docs/coming-from.md lists."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors import safe_open
from transformers import ResNetConfig, ResNetModel

from limbeck import Distiller
from limbeck.compat.automm import MultiModalPredictor
from limbeck.compat.automm_options import Options, flattened
from limbeck.tasks.fusion import FusionNetwork
from limbeck.tasks.pixels import Pixels
from limbeck.train import Callback
from tests import tiny

QUICK = {"optim.max_epochs": 2, "optim.lr": 5e-3, "env.batch_size": 16, "optim.val_check_interval": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    tiny.save_encoder(folder / "large")
    tiny.save_encoder(folder / "small", num_hidden_layers=1, hidden_size=8)
    return folder


def frame(rows=60):
    """A text that tells the label, a category and a number that do not."""
    made = tiny.table(rows).drop(columns="stars")
    return made.assign(price=np.linspace(1, 9, rows), shop=["a", "b", "c"] * (rows // 3))


def options(place, size="large", **more):
    names = {"model.hf_text.checkpoint_name": str(place / size), "model.fusion_mlp.hidden_sizes": [16]}
    return {**names, **QUICK, **{name.replace("__", "."): value for name, value in more.items()}}


@pytest.fixture(scope="module")
def teacher(place):
    predictor = MultiModalPredictor(label="label", path=place / "teacher", eval_metric="acc")
    return predictor.fit(frame(), tuning_data=frame(), hyperparameters=options(place, optim__max_epochs=20))


def distilled(place, teacher, path, data=None, **more):
    predictor = MultiModalPredictor(label="label", path=path)
    given = options(place, "small", **more)
    return predictor.fit(frame() if data is None else data, teacher_predictor=teacher, hyperparameters=given)


def test_a_trained_predictor_answers_as_automm_does(teacher):
    data = frame().set_index(pd.Index(range(100, 160)))
    assert teacher.problem_type == "binary"
    assert teacher.class_labels == ["bad", "good"]
    assert teacher.column_types == {"text": "text", "price": "numerical", "shop": "categorical"}
    predicted, shares = teacher.predict(data), teacher.predict_proba(data)
    assert (predicted.index == data.index).all()
    assert (predicted.name, list(shares.columns)) == ("label", ["bad", "good"])
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert (shares.idxmax(axis=1) == predicted).all()
    scores, again = teacher.evaluate(data, metrics=["accuracy", "f1", "roc_auc"], return_pred=True)
    assert scores["accuracy"] == np.mean(predicted == data.label) > 0.9
    assert again.equals(predicted)
    assert teacher.evaluate(data) == {"acc": scores["accuracy"]}
    second = teacher.predict_proba(data, as_multiclass=False)
    assert np.array_equal(second, shares["good"])
    assert teacher.extract_embedding(data).shape == (60, 16)
    assert teacher.extract_embedding(data, as_pandas=True).index.equals(data.index)
    assert teacher.fit_summary()["val_acc"] > 0.9
    assert teacher.total_parameters > 0 < teacher.model_size


def test_a_predictor_is_the_same_after_saving_and_holds_no_pickle(teacher, tmp_path):
    data = frame()
    teacher.save(tmp_path / "saved")
    loaded = MultiModalPredictor.load(tmp_path / "saved")
    assert np.array_equal(loaded.predict(data, as_pandas=False), teacher.predict(data, as_pandas=False))
    assert np.array_equal(loaded.predict_proba(data, as_pandas=False), teacher.predict_proba(data).to_numpy())
    assert loaded.fit_summary() == teacher.fit_summary()
    assert loaded.evaluate(data) == teacher.evaluate(data)
    kinds = {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_a_student_learns_from_a_predictor_or_its_folder(place, teacher, tmp_path):
    one = distilled(place, teacher, tmp_path / "one")
    two = distilled(place, teacher.path, tmp_path / "two")
    assert np.array_equal(one.predict_proba(frame()), two.predict_proba(frame()))
    with safe_open(tmp_path / "one" / "fusion.safetensors", "pt") as file:
        assert len(file.keys()) == len(one.model.network.state_dict())  # the student's, and nothing of the teacher
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        *("columns.json", "fusion.json", "fusion.safetensors", "text"),
    ]


def test_a_student_may_see_other_columns_than_its_teacher(place, teacher, tmp_path):
    predictor = distilled(place, teacher, tmp_path / "text", model__names=["hf_text"])
    assert list(predictor.model.network.parts) == ["text"]
    assert set(predictor.column_types.values()) == {"text"}  # numbers and categories, too
    predictor = distilled(
        place, teacher, tmp_path / "numbers", **{"model__names": ["numerical_mlp", "fusion_mlp"]}
    )
    assert list(predictor.model.network.parts) == ["numbers"]


def test_automms_own_test_of_distillation(place, tmp_path):
    """As its `test_distiller.py` does it: texts and images, all losses, a teacher and then its folder."""
    data = frame().assign(label=[0, 1, 2, 3, 4, 2] * 10)
    ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])).save_pretrained(
        place / "image"
    )
    Pixels(8, (0.5,) * 3, (0.5,) * 3).save_pretrained(place / "image")
    for i in range(5):
        Image.new("RGB", (9, 7), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    data["Images"] = [f"{tmp_path}/{label}.png;more.png" for label in data.label]
    hyperparameters = {
        "optimization.max_epochs": 1,
        "model.names": ["hf_text", "timm_image", "fusion_mlp"],
        "model.hf_text.checkpoint_name": str(place / "large"),
        "model.timm_image.checkpoint_name": str(place / "image"),
        "env.num_workers": 0,
        "env.num_workers_evaluation": 0,
    }
    losses = {
        "distiller.temperature": 5.0,
        "distiller.hard_label_weight": 0.1,
        "distiller.soft_label_weight": 1.0,
        "distiller.output_feature_loss_weight": 0.01,
        "distiller.rkd_distance_loss_weight": 0.01,
        "distiller.rkd_angle_loss_weight": 0.02,
        "distiller.output_feature_loss_type": "mse",
    }
    made = {"label": "label", "problem_type": "multiclass", "eval_metric": "quadratic_kappa"}
    teacher = MultiModalPredictor(**made)
    teacher.fit(train_data=data, hyperparameters=hyperparameters, time_limit=10, save_path=tmp_path / "teacher")
    for asked in (teacher, teacher.path):
        student = MultiModalPredictor(**made).fit(
            train_data=data,
            teacher_predictor=asked,
            hyperparameters={**hyperparameters, "model.hf_text.checkpoint_name": str(place / "small"), **losses},
            time_limit=10,
            save_path=tmp_path / "student",
        )
        (tmp_path / "saved").mkdir(exist_ok=True)
        student.save(tmp_path / "saved")
        loaded = MultiModalPredictor.load(tmp_path / "saved")
        for ask in (MultiModalPredictor.predict, MultiModalPredictor.predict_proba):
            ours, theirs = (ask(predictor, data, as_pandas=False) for predictor in (student, loaded))
            np.testing.assert_equal(theirs, ours)
            np.testing.assert_equal(ask(loaded, data, as_pandas=True).to_numpy(), ours)
        assert student.extract_embedding(data).shape[0] == len(data)
        assert set(student.evaluate(data)) == {"quadratic_kappa"}
        assert list(student.model.network.parts) == ["text", "image"]


def test_the_blocks_of_the_page_run(place, teacher, tmp_path, monkeypatch):
    """With a folder for the hub's model and one epoch; the import lines are the first block's right column."""
    page = (
        (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text().partition("## AutoGluon AutoMM")[2]
    )
    imports, script, plain = re.findall(r"```(?:python)?\n(.*?)```", page, flags=re.DOTALL)
    new = "\n".join(re.split(r" {3,}", line)[1] for line in imports.splitlines()[1:])
    monkeypatch.chdir(tmp_path)  # predictors without a path go to the working folder
    names = {"train": frame(), "test": frame(), "held_out": frame(), "teacher": teacher}
    small = {"google/bert_uncased_L-6_H-768_A-12": str(place / "small"), "epochs=3": "epochs=1"}
    common = f"hyperparameters={options(place)}"
    small['MultiModalPredictor(label="label")'] = f'MultiModalPredictor(label="label", {common})'
    for code in (new + "\n" + script, plain):
        for old, filled in small.items():
            code = code.replace(old, filled)
        exec(code, names)
    assert (tmp_path / "student" / "columns.json").is_file()
    assert len(list((tmp_path / "AutogluonModels").iterdir())) == 2


def test_training_on_goes_on_from_the_weights(place, tmp_path):
    predictor = MultiModalPredictor(label="label", path=tmp_path / "p")
    first = predictor.fit(frame(), hyperparameters=options(place)).predict_proba(frame())
    still = predictor.fit(frame(), hyperparameters=options(place, optim__lr=1e-12)).predict_proba(frame())
    np.testing.assert_allclose(still, first, atol=1e-5)


class _Interrupt(Callback):
    def on_checkpoint(self, state):
        if state.step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_where_it_was(place, tmp_path, monkeypatch):
    import limbeck.compat.automm as door

    given = options(place, optim__max_epochs=3)
    whole = MultiModalPredictor(label="label", path=tmp_path / "whole").fit(frame(), hyperparameters=given)
    real = door.fit_frame_model

    def interrupted(*given, **options):
        return real(*given, callbacks=[_Interrupt()], **options)

    monkeypatch.setattr(door, "fit_frame_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MultiModalPredictor(label="label", path=tmp_path / "half").fit(frame(), hyperparameters=given)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="did not end; load it with resume=True"):
        MultiModalPredictor.load(tmp_path / "half")
    assert MultiModalPredictor.load(tmp_path / "half", resume=True).fit_summary() == {}
    resumed = MultiModalPredictor.load(tmp_path / "half", resume=True).fit(frame(), hyperparameters=given)
    assert np.array_equal(resumed.predict_proba(frame()), whole.predict_proba(frame()))
    assert resumed.fit_summary()["steps"] == whole.fit_summary()["steps"]


@pytest.mark.parametrize("kind", ["regression", "multiclass", None])
def test_other_problems(place, tmp_path, kind):
    data = frame().assign(label=lambda f: np.where(f.label == "good", 4.5, 1.0) + np.linspace(0, 0.1, 60))
    if kind == "multiclass":
        data["label"] = [0, 1, 2] * 20
    predictor = MultiModalPredictor(label="label", problem_type=kind, path=tmp_path / "p")
    predictor.fit(data, hyperparameters=options(place, optim__max_epochs=6))
    if kind == "multiclass":
        assert predictor.predict_proba(data).shape == (60, 3)
        assert set(predictor.predict(data)) <= {0, 1, 2}
        return
    predicted = predictor.predict(data)
    error = np.sqrt(np.mean((predicted - data.label) ** 2))
    assert predictor.problem_type == "regression"
    assert predictor.evaluate(data) == pytest.approx({"root_mean_squared_error": error})
    with pytest.raises(ValueError, match="no probabilities"):
        predictor.predict_proba(data)


def test_hyperparameters_come_in_three_shapes_and_under_old_names():
    as_dict = {"optimization.learning_rate": 1e-4, "model.hf_text_abc.checkpoint_name": "a/b", "env.num_gpus": 1}
    as_list = [f"{name}={value}" for name, value in as_dict.items()]
    expected = {"optim.lr": 1e-4, "model.hf_text.checkpoint_name": "a/b", "env.num_gpus": 1}
    as_list[0] = "optimization.learning_rate=0.0001"
    assert flattened(as_dict) == flattened(as_list) == flattened(" ".join(as_list)) == expected
    assert flattened(None) == {}
    assert flattened({"model.hf_text.checkpoint_name": Path("a")}) == {"model.hf_text.checkpoint_name": "a"}


def test_what_is_not_understood_is_refused_with_the_nearest_name(place, teacher, tmp_path):
    with pytest.raises(TypeError, match=r"no option 'optim.max_epoch'; did you mean 'optim.max_epochs'"):
        Options.parse({"optimization.max_epoch": 3})
    with pytest.raises(ValueError, match="unknown presets 'medium'; did you mean 'medium_quality'"):
        Options.parse({}, "medium")
    with pytest.raises(ValueError, match=r"model.names has 'clip', which limbeck has not"):
        Options.parse({"model.names": ["clip"]}).kinds()
    with pytest.raises(ValueError, match=r"output_feature_loss_type is 'cosin'; did you mean 'cosine'"):
        Options.parse({"distiller.output_feature_loss_type": "cosin"}).terms(False, taught=True)
    with pytest.raises(ValueError, match=r"lr_schedule is 'cosine'; did you mean 'cosine_decay'"):
        Options.parse({"optim.lr_schedule": "cosine"}).settings(10, 0, None)
    for wrong, limit, told in (
        ({"optimization.max_epochs": 0}, None, r"^optim.max_epochs: Input should be greater than 0 \(got 0\)$"),
        ({"optim.lr": "fast"}, None, "^optim.lr: .* number"),
        ({"env.batch_size": 0}, None, "^env.batch_size is 0; it is a number above 0$"),
        ({"env.per_gpu_batch_size": "8 MB"}, None, "^env.per_gpu_batch_size is '8 MB'; it is a number above 0$"),
        ({}, 0, r"^time_limit: Input should be greater than 0 \(got 0\)$"),
    ):
        with pytest.raises(ValueError, match=told):
            Options.parse(wrong).settings(10, 0, limit)
    with pytest.raises(ValueError, match="a number to predict has no classes; use 'mse'"):
        Options.parse({"distiller.soft_label_loss_type": "cross_entropy"}).terms(True, taught=True)
    with pytest.raises(ValueError, match="a predictor trains on one device; set it to 1"):
        Options.parse({"env.num_gpus": 2}).settings(10, 0, None)
    with pytest.warns(UserWarning, match=r"not used, for limbeck has no counterpart: optim.lr_choice"):
        Options.parse({"optim.lr_choice": "two_stages"})
    with pytest.raises(ValueError, match="unknown problem_type 'binaer'; did you mean 'binary'"):
        MultiModalPredictor(label="label", problem_type="binaer")
    with pytest.raises(TypeError, match="MultiModalPredictor has no option 'pipelin'"):
        MultiModalPredictor(label="label", pipelin="x")
    with pytest.raises(ValueError, match="no label; name the column"):
        MultiModalPredictor(path=tmp_path).fit(frame())
    with pytest.raises(ValueError, match="not trained; call fit first"):
        MultiModalPredictor(label="label").predict(frame())
    with pytest.raises(ValueError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        teacher.evaluate(frame(), metrics="acuracy")
    with pytest.raises(ValueError, match="holds no model of data frames"):
        MultiModalPredictor.load(tmp_path)
    with pytest.raises(TypeError, match="a teacher is a trained predictor or its folder, got a int"):
        MultiModalPredictor(label="label").fit(frame(), teacher_predictor=3)
    with pytest.raises(ValueError, match=r"'env': 'mine.yaml', which is not read; pass hyperparameters"):
        MultiModalPredictor(label="label").fit(frame(), config={"env": "mine.yaml"})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and no model of data frames; choose another folder"):
        teacher.save(tmp_path)
    (tmp_path / "project" / "training").mkdir(parents=True)
    (tmp_path / "project" / "training" / "photo.png").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and no model"):
        MultiModalPredictor(label="label", path=tmp_path / "project").fit(
            frame(), hyperparameters={**QUICK, "model.names": ["numerical_mlp"]}
        )
    assert (tmp_path / "project" / "training" / "photo.png").is_file()


def test_settings_are_those_that_automm_would_use():
    given = {"optim.max_epochs": 4, "env.batch_size": 32, "optim.warmup_steps": 0.2, "optim.weight_decay": 0.1}
    made = Options.parse({**given, "optim.lr_schedule": "polynomial_decay"}).settings(
        rows=100, seed=9, time_limit=5
    )
    assert (made.epochs, made.batch_size, made.warmup, made.weight_decay) == (4, 32, 0.2, 0.1)
    assert (made.schedule, made.seed, made.time_limit, made.best, made.patience) == ("linear", 9, 5, True, 10)
    assert (made.accumulation, made.evaluate_every) == (4, 2)  # eight examples at a time; each half epoch
    assert Options.parse({}).settings(20, 0, None).accumulation == 3
    assert Options.parse({"optim.max_steps": 7}).settings(20, 0, None).steps == 7


def signals(outputs=3, widths=(8, 8), rows=6):
    """A student and a teacher, what they say of some rows, and labels."""
    torch.manual_seed(2)
    student, teacher = (FusionNetwork(outputs, numbers=4, hidden=width, dropout=0.0) for width in widths)
    batch = {"numbers": torch.randn(rows, 1, 4)}
    labels = torch.randn(rows) if outputs == 1 else torch.randint(outputs, (rows,))
    return student, teacher.eval(), batch, labels


def values(given, outputs=3, widths=(8, 8), rows=6):
    """Each term of the door on one batch, and what it was made of."""
    student, teacher, batch, labels = signals(outputs, widths, rows)
    terms = Options.parse({f"distiller.{k}": v for k, v in given.items()}).terms(outputs == 1, taught=True)
    distiller = Distiller(student, teacher, terms)
    output = distiller(**batch, labels=labels)
    output.loss.backward()
    return output, student(**batch), teacher(**batch), distiller


ALL = {
    "softmax_regression_weight": 0.5,
    "output_feature_loss_weight": 0.2,
    "rkd_distance_loss_weight": 0.3,
    "rkd_angle_loss_weight": 0.7,
}


def rkd(student, teacher):
    """Relational distillation as its paper writes it: naive loops over all pairs and triples."""

    def distances(x):
        made = torch.stack([torch.stack([(a - b).norm() for a in x]) for b in x])
        return made / made[made > 0].mean()

    def angles(x):
        between = torch.stack([torch.stack([F.normalize(a - b, dim=0) for a in x]) for b in x])
        return torch.stack([each @ each.T for each in between])

    return [F.smooth_l1_loss(of(student), of(teacher)).item() for of in (distances, angles)]


def test_every_term_is_automms_formula():
    output, student, teacher, distiller = values({**ALL, "temperature_squared": False, "temperature": 4.0})
    expected = {
        "soft_label": 16 * F.cross_entropy(student.logits / 4, (teacher.logits / 4).softmax(1)).item(),
        "output_feature": F.mse_loss(student.features, teacher.features).item(),
        "softmax_regression": F.mse_loss(distiller.teacher.module.head(student.features), teacher.logits).item(),
    }
    expected["rkd_distance"], expected["rkd_angle"] = rkd(student.features.detach(), teacher.features.detach())
    found = {name: value.item() for name, value in output.terms.items()}
    hard = found.pop("hard_label")
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    weights = {"soft_label": 1 / 16, "output_feature": 0.2, "softmax_regression": 0.5}
    weights |= {"rkd_distance": 0.3, "rkd_angle": 0.7}
    total = 0.1 * hard + sum(weights[name] * value for name, value in expected.items())
    assert output.loss.item() == pytest.approx(total, rel=1e-5)


def test_the_cross_entropy_of_softmax_regression():
    kind = {"softmax_regression_loss_type": "cross_entropy", "softmax_regression_weight": 1.0}
    output, student, teacher, distiller = values(kind)
    expected = F.cross_entropy(distiller.teacher.module.head(student.features), teacher.logits.softmax(1))
    assert output.terms["softmax_regression"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_corrected_the_soft_loss_counts_as_much_at_any_temperature():
    """AutoMM's gradient falls with T squared; at T = 5 it is a 25th of what the weight says."""
    norms = {}
    for corrected in (True, False):
        for temperature in (10.0, 40.0):
            given = {"hard_label_weight": 0, "output_feature_loss_weight": 0, "temperature": temperature}
            *_, distiller = values({**given, "temperature_squared": corrected})
            norms[corrected, temperature] = distiller.student.head.weight.grad.norm().item()
    assert norms[True, 40.0] == pytest.approx(norms[True, 10.0], rel=0.1)
    assert norms[False, 40.0] == pytest.approx(norms[False, 10.0] / 16, rel=0.1)


def test_corrected_numbers_are_not_divided_by_the_temperature():
    output, student, teacher, _ = values({"temperature": 5.0}, outputs=1)
    expected = F.mse_loss(student.logits, teacher.logits).item()
    assert output.terms["soft_label"].item() == pytest.approx(expected, rel=1e-5)
    output, *_ = values({"temperature": 5.0, "temperature_squared": False}, outputs=1)
    assert output.terms["soft_label"].item() == pytest.approx(expected / 25, rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "cosine_distance"])
def test_corrected_cosine_works(name):
    output, student, teacher, _ = values({"output_feature_loss_type": name})
    expected = F.cosine_embedding_loss(student.features, teacher.features, torch.ones(6)).item()
    assert output.terms["output_feature"].item() == pytest.approx(expected, rel=1e-5)


def test_corrected_the_documents_names_of_losses_work():
    one, two = (values({"output_feature_loss_type": name})[0] for name in ("mse", "mean_square_error"))
    assert one.loss.item() == two.loss.item()


def test_corrected_relations_of_a_batch_of_one_are_zero():
    output, _, _, distiller = values(ALL, rows=1)
    assert (output.terms["rkd_distance"].item(), output.terms["rkd_angle"].item()) == (0.0, 0.0)
    assert all(torch.isfinite(p.grad).all() for p in distiller.student.parameters() if p.grad is not None)


def test_corrected_the_teachers_head_gathers_no_gradient():
    _, _, _, distiller = values(ALL)
    assert all(parameter.grad is None for parameter in distiller.teacher.module.parameters())


def test_each_term_has_a_projection_of_its_own_where_widths_differ():
    output, *_, distiller = values(ALL, widths=(8, 12))
    projected = {term.name for term in distiller.terms if term.project}
    assert projected == {"output_feature", "softmax_regression"}
    shapes = [tuple(p.shape) for p in distiller.objective.parameters() if p.ndim == 2]
    assert shapes == [(12, 8), (12, 8)]
    assert not any(p.numel() for p in values(ALL)[-1].objective.parameters())
    assert torch.isfinite(output.loss)


def test_corrected_the_teacher_runs_once_and_not_in_evaluations(place, teacher, tmp_path, monkeypatch):
    asked = []
    network = teacher.model.network
    real = network.forward
    monkeypatch.setattr(network, "forward", lambda **batch: asked.append(len(batch["numbers"])) or real(**batch))
    student = distilled(place, teacher, tmp_path / "p", optim__max_epochs=4)
    trained = 60 - 12  # the holdout of a fifth is never asked about
    assert sum(asked) == trained == student.fit_summary()["teacher_examples"]


def test_corrected_the_scale_of_numbers_is_the_teachers(place, tmp_path):
    """AutoMM standardises each side's labels by its own rows, and compares the results as if they were alike."""
    data = frame().assign(label=np.linspace(0, 100, 60))
    teacher = MultiModalPredictor(label="label", path=tmp_path / "t")
    teacher.fit(data, tuning_data=data, hyperparameters=options(place))
    student = distilled(place, teacher, tmp_path / "s", data.head(30))
    assert student.model.columns.scale == teacher.model.columns.scale
    assert student.model.columns.scale[0] == pytest.approx(50.0)


@pytest.mark.parametrize(
    "wrong", [{"optim.max_epochs": -3}, {"optim.lr_schedule": "cos"}, {"model.hf_text.checkpoint_name": "/no"}]
)
def test_what_is_refused_leaves_an_older_predictor_and_answers_nothing(place, tmp_path, wrong):
    old = MultiModalPredictor(label="label", path=tmp_path).fit(frame(), hyperparameters=options(place))
    new = MultiModalPredictor(label="label", path=tmp_path)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        new.fit(frame(), hyperparameters={**options(place), **wrong})
    with pytest.raises(ValueError, match="not trained"):
        new.predict(frame())
    broken = MultiModalPredictor.load(tmp_path)
    broken.model.network.head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="is nan before any training"):  # which the preflight alone can see
        broken.fit(frame(), hyperparameters=options(place))
    assert MultiModalPredictor.load(tmp_path).predict_proba(frame()).equals(old.predict_proba(frame()))


def test_columns_may_be_numbered_and_stand_in_another_order(tmp_path):
    data = pd.DataFrame({0: np.linspace(0, 9, 40), 1: ["a", "b"] * 20, 2: ["u", "v"] * 20})
    predictor = MultiModalPredictor(label=2, problem_type="classification", path=tmp_path / "p")
    predictor.fit(data, hyperparameters=QUICK)
    other = data[[1, 0]].assign(**{"more": 3})
    expected = predictor.predict_proba(data)
    np.testing.assert_array_equal(predictor.predict_proba(other), expected)
    np.testing.assert_array_equal(MultiModalPredictor.load(tmp_path / "p").predict_proba(other), expected)
    with pytest.raises(ValueError, match="the table has no column '0'"):
        predictor.predict(data[[1, 2]])


def test_hyperparameters_without_a_value_and_a_single_width():
    with pytest.raises(ValueError, match=r"'optim.max_epochs' has no value; write it as name=value"):
        flattened("optim.max_epochs")
    assert Options.parse({"model.fusion_mlp.hidden_sizes": 24}).architecture()["hidden"] == 24
