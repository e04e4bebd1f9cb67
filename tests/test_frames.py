"""Data frames of mixed columns: what is found in them, what becomes of a row, a network that reads all of it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference
from transformers import ResNetConfig, ResNetModel

from limbeck import Settings, Term
from limbeck.evaluate import Bootstrap
from limbeck.frame_model import FrameModel, fit_frame_model
from limbeck.metrics import METRICS, check_metrics
from limbeck.students import take_layers
from limbeck.tasks.column_kinds import as_frame, column_types, problem_of
from limbeck.tasks.frames import Columns
from limbeck.tasks.fusion import FusionNetwork, TextPart
from limbeck.tasks.pixels import Pixels
from limbeck.train import Callback
from tests import tiny
from tests.models import bert

HARD = Term("labels", loss="cross_entropy")
QUICK = Settings(epochs=6, batch_size=16, learning_rate=5e-3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An encoder of texts, one of images, and pictures of two colours."""
    folder = tmp_path_factory.mktemp("frames")
    tiny.save_encoder(folder / "text")
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder / "image")
    Pixels(8, (0.5,) * 3, (0.5,) * 3).save_pretrained(folder / "image")
    for name, colour in (("dark", 20), ("light", 230)):
        Image.new("RGB", (9, 7), (colour,) * 3).save(folder / f"{name}.png")
    return folder


def mixed(folder, rows=60):
    """A column of each kind; the label depends on the text alone."""
    frame = tiny.table(rows).rename(columns={"label": "tone"})
    frame["weight"] = np.linspace(-3, 8, rows)
    frame["shop"] = ["north", "south", "east"] * (rows // 3)
    frame["picture"] = [str(folder / ("dark.png" if i % 3 else "light.png")) for i in range(rows)]
    frame["same"] = "always"
    return frame.drop(columns="stars")


def built(frame, place, label="tone", **options):
    columns = Columns.find(frame, label, **options)
    return FrameModel.build(columns, text=place / "text", image=place / "image", hidden=16)


def test_each_kind_of_column_is_found(place):
    frame = mixed(place)
    frame["gone"] = None
    frame["code"] = [f"x{i}" for i in range(60)]
    frame["ordered"] = pd.Categorical(list("abcdef") * 10)
    frame["true"] = [True, False] * 30
    frame["bytes"] = [(place / "dark.png").read_bytes()] * 60
    assert column_types(frame, "tone") == {
        "text": "text",
        "weight": "numerical",
        "shop": "categorical",
        "picture": "image_path",
        "same": "null",
        "gone": "null",
        "code": "categorical",
        "ordered": "categorical",
        "true": "categorical",
        "bytes": "image_path",
    }


def test_few_distinct_numbers_are_categories_and_many_are_not():
    few, many = pd.DataFrame({"x": [1, 2, 3, 4] * 20}), pd.DataFrame({"x": [1, 2, 3, 4] * 10})
    assert column_types(few) == {"x": "categorical"}  # 4 of 80 rows, below a tenth
    assert column_types(many) == {"x": "numerical"}  # 4 of 40 rows, not below


def test_what_a_user_says_of_columns_counts(place):
    found = column_types(mixed(place), "tone", given={"weight": "categorical", "shop": "null"})
    assert (found["weight"], found["shop"]) == ("categorical", "null")
    with pytest.raises(ValueError, match="column_types names 'wieght', no column; did you mean 'weight'"):
        column_types(mixed(place), given={"wieght": "text"})
    with pytest.raises(ValueError, match="cannot be 'number'; did you mean 'numerical'"):
        column_types(mixed(place), given={"weight": "number"})


def test_columns_that_a_model_cannot_read_become_text_or_are_left_out(place):
    as_text = column_types(mixed(place), "tone", allowed={"text"})
    assert as_text == {"text": "text", "weight": "text", "shop": "text", "picture": "null", "same": "null"}
    only_numbers = column_types(mixed(place), "tone", allowed={"numerical"})
    assert [name for name, kind in only_numbers.items() if kind != "null"] == ["weight"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([3, 7] * 10, "binary"),
        ([True, False], "binary"),
        (["a", "b", "c"], "multiclass"),
        ([0, 1, 2] * 10, "multiclass"),
        ([0.0, 1.0, 2.0] * 10, "multiclass"),
        ([0, 1, 2], "regression"),
        ([0.5, 1.0, 2.0] * 10, "regression"),
        (list(range(100)) * 20, "multiclass"),
        (list(range(101)) * 19, "regression"),
    ],
)
def test_problems_are_told_as_autogluon_tells_them(values, problem):
    assert problem_of(pd.Series(values)) == problem


def test_a_frame_comes_from_a_file_columns_or_rows(tmp_path):
    frame = tiny.table(6)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for data in (tmp_path / "a.csv", str(tmp_path / "a.parquet"), frame.to_dict("list"), frame.to_dict("records")):
        assert as_frame(data).equals(frame)
    with pytest.raises(TypeError, match="a int is no table"):
        as_frame(3)
    with pytest.raises(ValueError, match="no rows"):
        as_frame(frame.head(0))


def test_rows_become_standardised_numbers_and_known_categories():
    train = pd.DataFrame({"x": [1.0, 3.0, np.nan, 5.0], "c": ["p", "q", None, "q"], "y": [0, 1, 0, 1]})
    columns = Columns.find(train, "y", given={"c": "categorical"})
    later = pd.DataFrame({"x": [3.0, np.nan, 7.0], "c": ["q", "new", None]})
    batch = columns.encode(later, labelled=False).batch([0, 1, 2])
    deviation = np.std([1.0, 3.0, 5.0])
    expected = [[0.0, 0.0], [0.0, 1.0], [4 / deviation, 0.0]]
    torch.testing.assert_close(batch["numbers"].squeeze(1), torch.tensor(expected, dtype=torch.float32))
    assert batch["categories"].flatten().tolist() == [2, 0, 0]


def test_whole_numbers_are_the_same_category_beside_a_missing_one():
    columns = Columns.find(pd.DataFrame({"c": [1, 2, 1, 2], "y": [0, 1, 0, 1]}), "y", given={"c": "categorical"})
    later = pd.DataFrame({"c": [2, None, 1]})
    assert columns.encode(later, labelled=False).batch([0, 1, 2])["categories"].flatten().tolist() == [2, 0, 1]


def test_texts_of_several_columns_are_read_together(place):
    frame = pd.DataFrame({"a": ["the fine film"], "b": ["a dull book"], "c": ["it was cold"], "y": [0]})
    frame = pd.concat([frame, frame.assign(y=1, b=None)], ignore_index=True)
    model = built(frame, place, "y", given=dict.fromkeys("abc", "text"))
    batch = model.encode(frame).batch([0, 1])
    decoded = [model.tokenizer.decode(ids) for ids in batch["input_ids"]]
    assert decoded[0] == "[CLS] the fine film [SEP] a dull book [SEP] it was cold [SEP]"
    assert decoded[1].startswith("[CLS] the fine film [SEP] [SEP] it was cold [SEP]")


def test_a_missing_image_is_grey_and_a_broken_one_is_named(place, tmp_path):
    frame = mixed(place, 6)[["picture", "tone"]]
    columns = Columns.find(frame, "tone")
    pixels = Pixels(8, (0.5,) * 3, (0.5,) * 3)
    frame.loc[0, "picture"] = None
    batch = columns.encode(frame, pixels=pixels).batch([0, 1])
    assert batch["pixel_values"].shape == (2, 1, 3, 8, 8)
    assert batch["pixel_values"][0].abs().max() == 0
    torch.testing.assert_close(batch["pixel_values"][1], torch.full((1, 3, 8, 8), (20 / 255 - 0.5) / 0.5))
    (tmp_path / "half.png").write_text("no image")
    frame.loc[1, "picture"] = str(tmp_path / "half.png")
    with pytest.raises(ValueError, match=r"column 'picture', row 1 \(.*half.png\) is no image"):
        columns.encode(frame, pixels=pixels).batch([1])


def test_labels_that_make_no_task_are_refused():
    frame = pd.DataFrame({"x": [1.0, 2.0, 4.0], "y": ["a", "b", None]})
    with pytest.raises(ValueError, match="has no value in 1 of 3 rows; drop them"):
        Columns.find(frame, "y")
    with pytest.raises(ValueError, match="no label column 'z'; known: x, y"):
        Columns.find(frame, "z")
    with pytest.raises(ValueError, match="has 1 classes"):
        Columns.find(frame.assign(y="a"), "y", "multiclass")
    with pytest.raises(ValueError, match="no column to learn from beside 'y'"):
        Columns.find(frame.dropna().assign(x=1.0), "y")
    columns = Columns.find(frame.dropna(), "y")
    with pytest.raises(ValueError, match="the label 'c' in column 'y' is none of"):
        columns.labels(frame.fillna("c"))
    with pytest.raises(ValueError, match="the table has no column 'x'; known: why"):
        columns.encode(pd.DataFrame({"why": [1.0]}), labelled=False)
    with pytest.raises(ValueError, match="column 'x' holds what is no number"):
        columns.encode(pd.DataFrame({"x": ["three"]}), labelled=False)


@pytest.mark.parametrize(
    "kinds", [["text"], ["picture"], ["shop"], ["weight"], ["text", "picture", "shop", "weight"]]
)
def test_the_network_is_the_same_after_saving(place, tmp_path, kinds):
    frame = mixed(place, 30)[[*kinds, "tone"]]
    model = built(frame, place)
    model.save(tmp_path / "model")
    loaded = FrameModel.load(tmp_path / "model")
    assert np.array_equal(loaded.logits(frame), model.logits(frame))
    assert np.array_equal(loaded.features(frame), model.features(frame))
    assert loaded.columns == model.columns
    assert {p.suffix for p in (tmp_path / "model").rglob("*") if p.is_file()} <= {".json", ".safetensors"}


def test_features_of_one_part_are_its_own_and_of_several_are_fused(place):
    frame = mixed(place, 30)
    alone, fused = built(frame[["text", "tone"]], place), built(frame, place)
    assert alone.features(frame).shape == (30, 16)  # the encoder's width
    assert fused.network.features.width == 16  # `hidden`
    assert list(fused.network.parts) == ["text", "image", "categories", "numbers"]
    batch = alone.encode(frame).batch([0, 1])
    own = (
        alone.network.eval()
        .parts["text"]
        .encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    )
    expected = own.last_hidden_state[:, 0].detach().numpy()
    np.testing.assert_allclose(alone.features(frame)[:2], expected, atol=1e-6)


def test_the_mean_of_tokens_leaves_padding_out():
    part = TextPart(bert(kind="BertModel").eval(), "mean")
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    mask = (ids != 0).long()
    padded = part({"input_ids": ids, "attention_mask": mask})
    short = part({"input_ids": ids[:, :3], "attention_mask": mask[:, :3]})
    torch.testing.assert_close(padded, short)
    hidden = part.encoder(input_ids=ids[:, :3], attention_mask=mask[:, :3]).last_hidden_state
    torch.testing.assert_close(short, (hidden[:, 0] + hidden[:, 1] + hidden[:, 2]) / 3)
    with pytest.raises(ValueError, match="unknown pooling 'max'"):
        TextPart(bert(kind="BertModel"), "max")


@pytest.mark.parametrize("told_by", ["text", "picture", "shop", "weight"])
def test_each_part_is_learned_from(place, told_by):
    """The label follows from one column; the others are there and say nothing."""
    frame = mixed(place)
    other = {
        "text": frame.tone == "good",
        "picture": frame.picture.str.contains("dark"),
        "shop": frame["shop"] == "east",
        "weight": frame.weight > 2,
    }[told_by]
    frame = frame.assign(tone=np.where(other, "good", "bad"))
    model = built(frame, place)
    settings = Settings(epochs=25, batch_size=16, learning_rate=5e-3)
    assert fit_frame_model(model, frame, frame, settings, [HARD]).best_score > 0.95


def test_a_number_is_predicted_in_its_own_units():
    frame = pd.DataFrame({"x": np.linspace(0, 1, 64)}).assign(y=lambda f: 1000 + 300 * f.x)
    model = FrameModel.build(Columns.find(frame, "y"), hidden=16)
    settings = Settings(epochs=40, batch_size=16, learning_rate=0.02)
    terms = [Term("labels", loss="label_mse")]
    fitted = fit_frame_model(model, frame, frame, settings, terms, metric="rmse")
    predicted = model.labels(model.logits(frame))
    assert fitted.history[-1][1] == pytest.approx(np.sqrt(np.mean((predicted - frame.y) ** 2)), rel=1e-5)
    assert fitted.best_score < 60  # of a spread of 300


def test_a_teacher_of_other_columns_is_asked_once_for_each_row(place):
    """It reads texts, and its student numbers and pictures, which hold the label too."""
    frame = mixed(place).assign(
        weight=lambda f: (f.tone == "good") * 2.0 + np.random.default_rng(0).normal(size=60)
    )
    teacher = built(frame[["text", "tone"]], place)
    fit_frame_model(teacher, frame, None, QUICK, [HARD])
    student = built(frame[["picture", "weight", "tone"]], place, like=teacher.columns)
    before = teacher.logits(frame)
    terms = [
        Term("logits", loss="forward_kl", name="kd"),
        Term("features", loss="mse", name="features", project="linear"),
        Term("features", loss="softmax_regression", head="head", project="linear"),
        Term("features", loss="rkd_angle"),
    ]
    fitted = fit_frame_model(student, frame, frame, QUICK, terms, teacher=teacher)
    assert fitted.teacher_examples == 60
    assert fitted.examples == 60 * 6
    assert np.array_equal(teacher.logits(frame), before)
    assert all(parameter.grad is None for parameter in teacher.network.head.parameters())


def test_a_teacher_with_another_tokenizer(place, tmp_path):
    frame = mixed(place)[["text", "tone"]]
    teacher = built(frame, place)
    tokenizer = tiny.train_tokenizer([" ".join(tiny.FILLER)], vocabulary=40)
    small = bert(kind="BertModel", layers=1, width=12, vocab_size=len(tokenizer))
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    student = FrameModel.build(Columns.find(frame, "tone", like=teacher.columns), text=tmp_path / "small")
    longest = [max(model.encode(frame).lengths) for model in (student, teacher)]
    assert longest[0] > longest[1]
    fit_frame_model(student, frame, None, QUICK, [Term("logits", loss="forward_kl")], teacher=teacher)


def test_a_teacher_for_other_labels_is_refused(place):
    frame = mixed(place)[["weight", "tone"]]
    teacher = built(frame, place)
    other = built(frame.assign(tone=frame.tone.replace("good", "fine")), place)
    with pytest.raises(ValueError, match=r"the student's classes are .*Columns\.find"):
        fit_frame_model(other, frame, None, QUICK, [HARD], teacher=teacher)
    with pytest.raises(ValueError, match="trained for a binary problem, the student's is regression"):
        Columns.find(frame.assign(tone=frame.weight), "tone", "regression", like=teacher.columns)
    with pytest.raises(ValueError, match="the label 'new'"):
        Columns.find(frame.replace("good", "new"), "tone", like=teacher.columns)
    reordered = Columns.find(frame, "tone", like=teacher.columns)
    assert reordered.classes == teacher.columns.classes


def test_what_cannot_be_built_is_refused(place, tmp_path):
    columns = Columns.find(mixed(place), "tone")
    with pytest.raises(ValueError, match="column 'text' holds text and there is no encoder"):
        FrameModel.build(columns)
    with pytest.raises(ValueError, match="needs a part"):
        FusionNetwork(2)
    for load in (FrameModel.load, FusionNetwork.load):
        with pytest.raises(ValueError, match=r"for it has no .*; correct the path"):
            load(tmp_path)


def test_an_encoder_is_loaded_whole(place, tmp_path):
    tiny.save_classifier(tmp_path / "classifier", ["no", "yes"])
    frame = mixed(place)[["text", "tone"]]
    model = FrameModel.build(Columns.find(frame, "tone"), text=tmp_path / "classifier")
    assert type(model.network.parts["text"].encoder).__name__ == "BertModel"
    assert take_layers(model.network.parts["text"].encoder, [1]).config.num_hidden_layers == 1
    assert json.loads((Path(place) / "text" / "config.json").read_text())["architectures"] == ["BertModel"]


def test_rows_are_set_aside_of_each_class():
    frame = pd.DataFrame({"x": np.arange(50.0), "y": ["rare"] * 10 + ["often"] * 40})
    columns = Columns.find(frame, "y")
    kept, held = columns.split(frame)
    assert (len(kept), len(held)) == (40, 10)
    assert held.y.value_counts().to_dict() == {"often": 8, "rare": 2}
    assert not set(kept.index) & set(held.index)
    assert columns.split(frame)[1].equals(held)
    assert len(columns.split(frame, 0.5)[1]) == 25
    with pytest.raises(ValueError, match="leaves none to train on"):
        columns.split(frame, 0.999)


@pytest.mark.parametrize("weighted", [False, True])
def test_new_metrics_of_classes_agree_with_scikit_learn(weighted):
    draw = np.random.default_rng(0)
    labels, predicted = draw.integers(0, 4, 90), draw.integers(0, 4, 90)
    weights = draw.integers(1, 4, 90).astype(float) if weighted else None
    kappa = reference.cohen_kappa_score(labels, predicted, weights="quadratic", sample_weight=weights)
    assert METRICS["quadratic_kappa"].score(predicted, labels, weights) == pytest.approx(kappa)
    balanced = reference.balanced_accuracy_score(labels, predicted, sample_weight=weights)
    assert METRICS["balanced_accuracy"].score(predicted, labels, weights) == pytest.approx(balanced)


def test_new_metrics_of_numbers_and_margins_agree_with_scikit_learn():
    draw = np.random.default_rng(0)
    labels, predicted = draw.normal(size=40), draw.normal(size=(40, 1))
    assert METRICS["rmse"](predicted, labels) == pytest.approx(
        reference.root_mean_squared_error(labels, predicted[:, 0])
    )
    assert METRICS["r2"](predicted, labels) == pytest.approx(reference.r2_score(labels, predicted[:, 0]))
    logits, classes = draw.normal(size=(40, 2)), draw.integers(0, 2, 40)
    shares = torch.softmax(torch.tensor(logits), 1)[:, 1].numpy()
    assert METRICS["roc_auc"](logits, classes) == pytest.approx(reference.roc_auc_score(classes, shares))
    assert METRICS["roc_auc"](logits, np.zeros(40, int)) == 0.5
    assert METRICS["r2"](predicted, np.ones(40)) == 0.0
    assert METRICS["quadratic_kappa"](logits, np.argmax(logits, 1) * 0) <= 0.0
    with pytest.raises(ValueError, match="'roc_auc' judges 2 classes, the task has 3 classes"):
        check_metrics(["roc_auc"], 3)


def test_margins_are_resampled():
    labels = np.arange(60) % 2
    logits = np.stack([np.zeros(60), labels + np.random.default_rng(0).normal(size=60)], axis=1)
    bootstrap = Bootstrap(labels, METRICS["roc_auc"], resamples=200)
    found = Bootstrap.interval(bootstrap.scores([logits]))
    assert found.low < found.value == METRICS["roc_auc"](logits, labels) < found.high


def test_cells_that_no_model_can_read_are_named_before_the_training(place):
    frame = mixed(place, 6)
    with pytest.raises(ValueError, match="column 'weight' holds inf in row 2; correct it, or empty the cell"):
        Columns.find(frame.assign(weight=[1.0, 2.0, np.inf, 4.0, 5.0, 6.0]), "tone")
    with pytest.raises(ValueError, match="column 'shop' holds a list in a cell; spread it over columns"):
        Columns.find(frame.assign(shop=[[1, 2]] * 6), "tone")
    with pytest.raises(ValueError, match="several columns 'weight'; rename all but one"):
        as_frame(pd.concat([frame, frame[["weight"]]], axis=1))
    columns = Columns.find(frame[["picture", "tone"]], "tone")
    gone = frame.assign(picture=["/no/such.png", *frame.picture[1:]])
    with pytest.raises(ValueError, match=r"column 'picture', row 0: there is no file .*such.png; correct it"):
        columns.encode(gone, pixels=Pixels(8, (0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize(
    "labels", [pd.to_datetime(["2020-01-01", "2020-01-02"] * 3), [(1,), (2,)] * 3, [1, "a"] * 3]
)
def test_labels_that_cannot_be_kept_are_refused(labels):
    frame = pd.DataFrame({"x": range(6), "y": labels})
    with pytest.raises(ValueError, match=r"the label column 'y' holds .*; labels are all words, or all numbers"):
        Columns.find(frame, "y")


def test_texts_of_numbers_are_numbers_as_with_automm():
    frame = pd.DataFrame({"x": [str(i / 7) for i in range(20)], "date": pd.date_range("2020", periods=20)})
    assert column_types(frame) == {"x": "numerical", "date": "categorical"}
    columns = Columns.find(frame.assign(x=[None, *frame.x[1:]], y=[0, 1] * 10), "y", given={"date": "null"})
    batch = columns.encode(frame.tail(2), labelled=False).batch([0, 1])
    known = np.arange(1, 20) / 7
    expected = (np.array([18, 19]) / 7 - known.mean()) / known.std()
    np.testing.assert_allclose(batch["numbers"][:, 0, 0], expected, rtol=1e-5)


def test_a_classification_has_as_many_classes_as_there_are(place):
    """Where the teacher knows more of them than the student's rows show, as many as the teacher's."""
    frame = pd.DataFrame({"x": range(12), "y": [0, 1, 2] * 4})
    three = Columns.find(frame, "y", "classification")
    assert (three.problem, three.classes) == ("multiclass", (0, 1, 2))
    two = frame[frame.y < 2]
    assert Columns.find(two, "y", "classification").problem == "binary"
    assert Columns.find(two, "y", "classification", like=three).problem == "multiclass"
    with pytest.raises(ValueError, match="no label column 'z'"):
        Columns.find(frame, "z", "classification")
    with pytest.raises(ValueError, match="unknown problem_type 'multi'; did you mean 'multiclass'"):
        Columns.find(frame, "y", "multi")


def test_names_of_columns_that_are_numbers_become_texts():
    assert list(as_frame(pd.DataFrame({0: [1], 1: [2]})).columns) == ["0", "1"]


@pytest.mark.parametrize("share", [0, 1.0, -0.1])
def test_a_holdout_is_a_share(share):
    frame = pd.DataFrame({"x": range(12), "y": [0, 1] * 6})
    with pytest.raises(ValueError, match="above 0 and below 1, got"):
        Columns.find(frame, "y").split(frame, share)


def test_scores_are_those_of_the_labels(place):
    frame = pd.DataFrame({"x": [1.0, 2.0, 4.0, 3.0], "y": ["b", "a", "b", "a"]})
    model = FrameModel.build(Columns.find(frame, "y"))
    logits = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert model.scores(logits, frame, ["accuracy"]) == {"accuracy": 0.75}
    with pytest.raises(ValueError, match="judges numbers"):
        model.scores(logits, frame, ["rmse"])


class _Interrupt(Callback):
    def on_checkpoint(self, state):
        if state.step == 3:
            raise KeyboardInterrupt


def test_a_model_is_fitted_into_a_folder_and_goes_on_there(tmp_path):
    frame = pd.DataFrame({"x": [float(i % 7) for i in range(64)], "y": [i % 7 > 3 for i in range(64)]})
    settings = Settings(epochs=3, batch_size=16, learning_rate=0.02, evaluate_every=1, checkpoint_every=1)

    def fitted(folder, model=None, callbacks=(), terms=(HARD,)):
        model = model or FrameModel.build(Columns.find(frame, "y"), hidden=8)
        fit_frame_model(model, frame, frame, settings, terms, folder=folder, callbacks=callbacks)
        return FrameModel.load(folder)

    whole = fitted(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "half", callbacks=[_Interrupt()])
    with pytest.raises(ValueError, match="half did not end; load it with resume=True, and fit it again"):
        FrameModel.load(tmp_path / "half")
    resumed = fitted(tmp_path / "half", FrameModel.load(tmp_path / "half", resume=True))
    np.testing.assert_array_equal(resumed.logits(frame), whole.logits(frame))
    assert resumed.notes["fit"]["steps"] == whole.notes["fit"]["steps"] == 12
    assert not (tmp_path / "half" / "training").exists()

    with pytest.raises(ValueError, match="features"):  # what is refused leaves the older model
        fitted(tmp_path / "whole", terms=[Term("feature", loss="mse")])
    np.testing.assert_array_equal(FrameModel.load(tmp_path / "whole").logits(frame), whole.logits(frame))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "mine" / "training").mkdir(parents=True)
    (tmp_path / "mine" / "training" / "photo.png").write_text("mine")
    for folder in ("other", "mine"):
        for write in (whole.save, fitted):
            with pytest.raises(ValueError, match="holds other files and no model of data frames; choose another"):
                write(tmp_path / folder)
    assert (tmp_path / "mine" / "training" / "photo.png").is_file()
