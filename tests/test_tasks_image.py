"""The image task: pictures from anywhere, augmented the same however a training is cut, models of any kind."""

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTImageProcessor,
)

import limbeck
from limbeck import Distiller, Examples, Settings, Term, fit
from limbeck.models import load_model, make_student
from limbeck.recipe import StudentSpec
from limbeck.tasks import HOLDOUT, TaskOptions, make_task
from limbeck.tasks.augment import Augment, random_crop, random_flip, random_resized_crop
from limbeck.tasks.image_files import Picture
from limbeck.tasks.pictures import PictureTask
from limbeck.tasks.pixels import Pixels, load_pixels, measured
from limbeck.train.data import ExampleBatches
from tests import tiny

CIFAR = Path(__file__).parent.parent.parent / "shared" / "data" / "cifar10"
CLASSES = ("blue", "red")
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def picture(label, seed, size=(16, 16)):
    """A noisy picture in the colour of its class."""
    values = np.random.default_rng((seed, label)).integers(0, 90, (*size, 3), np.uint8)
    values[..., 2 - 2 * label] += 130
    return Image.fromarray(values)


def encoded(image, suffix="png"):
    file = io.BytesIO()
    image.save(file, format="JPEG" if suffix in ("jpg", "jpeg") else suffix.upper())
    return file.getvalue()


def save_folders(folder, count=6, seed=0, **arguments):
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            suffix = ("png", "jpg", "JPG", "jpeg")[i % 4]
            data = encoded(picture(label, 1000 * seed + i, **arguments), suffix.lower())
            (folder / name / f"{i}.{suffix}").write_bytes(data)
    return folder


def save_parquet(path, count=12, seed=0, names=CLASSES, feature="Image", **columns):
    cells = [{"bytes": encoded(picture(i % 2, 1000 * seed + i)), "path": f"{i}.png"} for i in range(count)]
    columns = {"image": cells, "label": [i % 2 for i in range(count)], **columns}
    features = {"image": {"_type": feature}} if feature else {}
    if names:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table(columns)
    noted = json.dumps({"info": {"features": features}}).encode()
    pq.write_table(table.replace_schema_metadata({b"huggingface": noted}), path)
    return path


@pytest.fixture
def folders(tmp_path):
    save_folders(tmp_path / "data" / "train", 8)
    save_folders(tmp_path / "data" / "val", 4, seed=1)
    return tmp_path / "data"


def image_task(data, **values):
    return make_task(TaskOptions(name="image", data=str(data), **values))


def sizes(task):
    return {name: len(rows) for name, rows in task.splits.items()}


# ---- data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "test"])
def test_class_folders(tmp_path, name):
    save_folders(tmp_path / "train", 5)
    save_folders(tmp_path / name, 2, seed=1)
    (tmp_path / "train" / "red" / ".hidden.png").write_bytes(b"no image")
    task = image_task(tmp_path)
    assert task.labels == CLASSES
    assert sizes(task) == {"train": 10, "validation": 4}
    assert task.splits["train"].labels == [0] * 5 + [1] * 5
    blue, red = (task.splits["train"].inputs[i].decoded().mean((0, 1)) for i in (0, 5))
    assert blue.argmax() == 2
    assert red.argmax() == 0


def test_one_folder_is_split_by_class(tmp_path):
    task = image_task(save_folders(tmp_path / "data", 10))
    assert sizes(task) == {"train": 16, "validation": 4}
    assert sorted(task.splits["validation"].labels) == [0, 0, 1, 1]
    again = image_task(tmp_path / "data")
    assert task.splits["validation"].fingerprint() == again.splits["validation"].fingerprint()
    held = {p.content for p in task.splits["validation"].inputs}
    assert not held & {p.content for p in task.splits["train"].inputs}


def test_equal_pictures_stay_on_one_side(tmp_path):
    for i in range(10):
        for copy in range(3):
            path = tmp_path / "data" / CLASSES[i % 2] / f"{i}-{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i % 2, i).save(path)
    task = image_task(tmp_path / "data")
    assert sizes(task) == {"train": 24, "validation": 6}
    held = {p.content for p in task.splits["validation"].inputs}
    assert len(held) == 2
    assert not held & {p.content for p in task.splits["train"].inputs}


def test_parquet_with_the_hubs_metadata(tmp_path):
    save_parquet(tmp_path / "train-00000-of-00002.parquet", 6)
    save_parquet(tmp_path / "train-00001-of-00002.parquet", 4, seed=1)
    save_parquet(tmp_path / "test.parquet", 4, seed=2)
    task = image_task(tmp_path)
    assert task.labels == CLASSES
    assert sizes(task) == {"train": 10, "validation": 4}
    assert task.splits["train"].inputs[6].decoded().shape == (16, 16, 3)


def test_parquet_without_metadata_and_with_other_columns(tmp_path):
    words = {"colour": ["blue", "red"] * 10, "label": [7, 10] * 10}
    save_parquet(tmp_path / "a.parquet", 20, names=None, feature=None, **words)
    assert image_task(tmp_path / "a.parquet").labels == ("7", "10")
    assert image_task(tmp_path / "a.parquet", label="colour", image="image").labels == CLASSES


def test_parquet_that_names_files(tmp_path):
    cells = [{"bytes": None, "path": f"{i}.png"} for i in range(10)]
    for i in range(10):
        picture(i % 2, i).save(tmp_path / f"{i}.png")
    save_parquet(tmp_path / "a.parquet", 10, image=cells)
    assert image_task(tmp_path / "a.parquet").splits["train"].inputs[0].decoded().shape == (16, 16, 3)
    (tmp_path / "3.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*a.parquet, row 3 \(3.png\): No such file"):
        image_task(tmp_path / "a.parquet")


def test_pictures_of_every_kind_have_three_channels(tmp_path):
    values = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for mode in ("L", "1", "P", "RGBA", "CMYK", "LA"):
        suffix = "tif" if mode == "CMYK" else "png"
        path = tmp_path / f"{mode}.{suffix}"
        Image.fromarray(values).convert(mode).save(path)
        assert Picture(str(path), path=path).decoded().shape == (6, 8, 3)


def test_a_camera_held_upright(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(0, 0, (8, 16)).save(path, exif=exif)
    assert Picture("a", path=path).decoded().shape == (16, 8, 3)


def test_limits_and_holdout(tmp_path):
    save_folders(tmp_path / "train", 20)
    save_folders(tmp_path / "test", 10, seed=1)
    task = image_task(tmp_path, train_examples=20, eval_examples=6, holdout=0.25)
    assert sizes(task) == {"train": 15, "validation": 6, HOLDOUT: 5}


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-10 is not on this machine (../shared/data/cifar10)")
def test_cifar_as_it_is():
    task = image_task(CIFAR, train_examples=500, eval_examples=50)
    assert task.labels[:3] == ("airplane", "automobile", "bird")
    assert len(task.labels) == 10
    pixels = task.pixels
    assert pixels.size == 32
    # The published constants are 0.4914, 0.4822, 0.4465 and 0.2470, 0.2435, 0.2616.
    assert np.allclose(pixels.mean, (0.491, 0.482, 0.447), atol=0.02)
    assert np.allclose(pixels.std, (0.247, 0.244, 0.262), atol=0.02)


# ---- bad data ---------------------------------------------------------------------------------------------------


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="the image task needs --data"):
        make_task(TaskOptions(name="image"))
    with pytest.raises(ValueError, match=r"there is no file or folder .*nowhere"):
        image_task(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no class folders; put images into"):
        image_task(tmp_path)
    (tmp_path / "validation.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no train.parquet and no class folders"):
        image_task(tmp_path)


@pytest.mark.parametrize("data", [b"no image", b"", encoded(picture(0, 0))[:200]])
def test_a_file_that_is_no_image_is_named(folders, data):
    (folders / "train" / "red" / "broken.png").write_bytes(data)
    task = image_task(folders)
    with pytest.raises(
        ValueError, match=r"train/red/broken.png is no image that can be read \(.*\); replace"
    ) as e:
        task.encode(task.splits["train"], Pixels(16, (0.5,) * 3, (0.5,) * 3))
    assert "BytesIO" not in str(e.value)


def test_a_class_on_one_side_alone(folders):
    (folders / "val" / "green").mkdir()
    picture(0, 0).save(folders / "val" / "green" / "a.png")
    with pytest.raises(ValueError, match=r"the class 'green' stands in the validation split of .* alone; add"):
        image_task(folders)
    (folders / "val" / "green").rename(folders / "train" / "green")
    with pytest.raises(ValueError, match=r"the class 'green' stands in the train split of .* alone; add"):
        image_task(folders)


def test_folders_without_enough(folders, tmp_path):
    with pytest.raises(ValueError, match="class folders, which have no columns; drop"):
        image_task(folders, label="kind")
    (folders / "train" / "green").mkdir()
    with pytest.raises(ValueError, match=r"the class folder .*green holds no image"):
        image_task(folders)
    with pytest.raises(ValueError, match="the class 'blue' has 1 images, too few to set a fifth"):
        image_task(save_folders(tmp_path / "few", 1))
    for label in CLASSES:
        (tmp_path / "one" / label).mkdir(parents=True)
        picture(0, 0).save(tmp_path / "one" / label / "a.png")
    (tmp_path / "one" / "red").rename(tmp_path / "red")
    with pytest.raises(ValueError, match=r"holds \['blue'\] only; a task needs two classes"):
        image_task(tmp_path / "one")


def test_parquet_bad_input(tmp_path):
    path = save_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no column 'imgae'; did you mean 'image'"):
        image_task(path, image="imgae")
    with pytest.raises(ValueError, match="column 'label' holds no images"):
        image_task(path, image="label")
    with pytest.raises(ValueError, match="has no label column 'lable'; did you mean 'label'"):
        image_task(path, label="lable")
    cells = pq.read_table(path)["image"].to_pylist()
    with pytest.raises(ValueError, match=r"has 2 image columns \(image, other\); name one: task.image=COLUMN"):
        image_task(save_parquet(tmp_path / "two.parquet", other=cells))
    with pytest.raises(ValueError, match=r"column 'label' has no value in 1 of 12 rows"):
        image_task(save_parquet(tmp_path / "none.parquet", label=[None] + [0] * 11))
    with pytest.raises(ValueError, match="has the label -1, outside of its 2 classes"):
        image_task(save_parquet(tmp_path / "minus.parquet", label=[-1] + [0] * 11))
    with pytest.raises(ValueError, match=r"has the label 0.5, which is no class"):
        image_task(save_parquet(tmp_path / "half.parquet", names=None, label=[0.5] * 12))
    with pytest.raises(ValueError, match=r"row 0 has no image; drop the row"):
        image_task(save_parquet(tmp_path / "void.parquet", image=[{"bytes": None, "path": None}, *cells[1:]]))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"cannot read .*text.parquet as parquet"):
        image_task(tmp_path / "text.parquet")


def test_an_empty_split(tmp_path):
    save_parquet(tmp_path / "train.parquet")
    save_parquet(
        tmp_path / "validation.parquet",
        0,
        image=pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        label=pa.array([], pa.int64()),
    )
    with pytest.raises(ValueError, match=r"the validation split of .* is empty"):
        image_task(tmp_path)


def test_options_of_other_tasks_and_for_other_tasks(folders):
    with pytest.raises(ValueError, match="the task image takes no 'text'"):
        image_task(folders, text=("x",))
    with pytest.raises(ValueError, match="the task digits takes no 'size'"):
        make_task(TaskOptions(name="digits", size=8))
    with pytest.raises(ValueError, match="no augmentation 'flop'; did you mean 'flip'"):
        image_task(folders, augmentation=("flop",))
    with pytest.raises(ValueError, match="both cut images"):
        image_task(folders, augmentation=("crop", "resized_crop"))


# ---- pixels -----------------------------------------------------------------------------------------------------

PROCESSORS = {
    "squeezed": ViTImageProcessor(size={"height": 24, "width": 24}),
    "cut": DeiTImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 24, "width": 24}),
    "shorter": ConvNextImageProcessor(size={"shortest_edge": 24}, image_mean=[0.1, 0.2, 0.3]),
    "large": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "as it is": ViTImageProcessor(size={"height": 24, "width": 24}, do_normalize=False),
}


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (24, 24), (41, 41)])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_those_of_the_models_processor(tmp_path, kind, shape):
    processor = PROCESSORS[kind]
    processor.save_pretrained(tmp_path / "theirs")
    image = picture(1, 3, shape)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    pixels = load_pixels(tmp_path / "theirs")
    ours = pixels.normalised(torch.tensor(pixels.fit(np.asarray(image))).permute(2, 0, 1)[None])
    assert torch.allclose(ours, expected, atol=1e-5)
    (tmp_path / "ours").mkdir()
    pixels.save_pretrained(tmp_path / "ours")
    again = load_pixels(tmp_path / "ours")
    assert again == pixels.at(pixels.size)


def test_a_processor_that_does_more_is_refused(tmp_path):
    ViTImageProcessor(size={"height": 8, "width": 8}, rescale_factor=1 / 127.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does more than resizing, cutting and normalising"):
        load_pixels(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*preprocessor_config.json"):
        load_pixels(tmp_path)
    assert load_pixels(tiny.save_encoder(tmp_path / "text")) is None


def test_measured_constants_normalise():
    pictures = [np.asarray(picture(i % 2, i)) for i in range(20)]
    pixels = measured(pictures, 16)
    values = pixels.normalised(torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2))
    assert values.mean((0, 2, 3)).abs().max() < 1e-3
    assert (values.std((0, 2, 3)) - 1).abs().max() < 1e-3


# ---- augmentation -----------------------------------------------------------------------------------------------


def drawn(augment, image, size, count=400):
    return [augment(image, size, np.random.default_rng(i)) for i in range(count)]


def test_random_crop_is_a_shift_by_up_to_an_eighth():
    image = torch.arange(1, 257, dtype=torch.int16).reshape(1, 16, 16)
    shifts = set()
    for result in drawn(random_crop, image, 16):
        assert result.shape == (1, 16, 16)
        values = result[result > 0]
        row, column = (result[0] == values.min()).nonzero()[0].tolist()
        top, left = divmod(int(values.min()) - 1, 16)
        expected = torch.zeros_like(image)
        down, right = row - top, column - left
        rows, columns = slice(max(0, down), 16 + min(0, down)), slice(max(0, right), 16 + min(0, right))
        expected[0, rows, columns] = image[
            0, max(0, -down) : 16 - max(0, down), max(0, -right) : 16 - max(0, right)
        ]
        assert torch.equal(result, expected)
        shifts.add((down, right))
    assert shifts == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_random_flip_mirrors_half():
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    results = drawn(random_flip, image, 4)
    flipped = sum(torch.equal(r, image.flip(-1)) for r in results)
    assert flipped + sum(torch.equal(r, image) for r in results) == 400
    assert 160 < flipped < 240


def test_random_resized_crop_cuts_parts_of_the_published_sizes():
    # Each pixel tells its place, so that the range of a result tells what was cut out.
    rows, columns = torch.meshgrid(torch.arange(180), torch.arange(180), indexing="ij")
    image = torch.stack([rows, columns]).to(torch.uint8)
    areas, ratios = [], []
    for result in drawn(random_resized_crop, image, 16):
        assert result.shape == (2, 16, 16)
        assert result.dtype == torch.uint8
        tall, wide = (float(r.max()) - float(r.min()) for r in result)
        tall, wide = tall * 16 / 15, wide * 16 / 15  # the outermost samples lie half a cell inside
        areas.append(tall * wide / 180**2)
        ratios.append(wide / tall)
    assert 0.06 < min(areas) < 0.12
    assert 0.8 < max(areas) < 1.05
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.45
    flat = drawn(random_resized_crop, torch.zeros(3, 2, 90, dtype=torch.uint8), 8, 40)
    assert all(r.shape == (3, 8, 8) for r in flat)


def training_images(task, seed=0, epoch=0, rank=0, world=1, **settings):
    """What a training sees of each example, by its number."""
    examples = task.encode(task.splits["train"], None)
    batches = ExampleBatches(examples, Settings(seed=seed, **settings), rank, world)
    seen = {}
    for step in batches.epoch(epoch):
        for batch in step.micro_batches if step.share else ():
            (images,) = batch["inputs"]
            seen |= dict(zip(batch["example_id"].tolist(), images, strict=True))
    return seen


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[i], second[i]) for i in first)


@pytest.mark.parametrize("augmentation", [("crop", "flip"), ("resized_crop", "flip")])
def test_augmentation_depends_on_seed_epoch_and_example_alone(folders, augmentation):
    task = image_task(folders, augmentation=augmentation)
    whole = training_images(task, batch_size=8)
    assert len(whole) == 16
    assert same(whole, training_images(task, batch_size=8))
    assert same(whole, training_images(task, batch_size=5, accumulation=3))
    ranks = [training_images(task, rank=r, world=3, batch_size=8, accumulation=2) for r in range(3)]
    assert same(whole, {i: image for seen in ranks for i, image in seen.items()})
    for other in ({"epoch": 1}, {"seed": 1}):
        changed = training_images(task, **other, batch_size=8)
        assert sum(torch.equal(whole[i], changed[i]) for i in whole) < 4
    assert not torch.equal(whole[0] - whole[0].mean(), whole[1] - whole[1].mean())


def test_evaluation_sees_images_as_they_are(folders):
    for augmentation in ((), ("crop", "flip"), ("resized_crop",)):
        task = image_task(folders, augmentation=augmentation, size=12)
        rows = task.splits["validation"]
        batch = task.encode(rows, None).batch(range(len(rows)))
        expected = np.stack([task.pixels.fit(p.decoded()) for p in rows.inputs])
        assert torch.equal(batch["inputs"][0], task.pixels.normalised(torch.tensor(expected).permute(0, 3, 1, 2)))
        assert batch["labels"].tolist() == rows.labels


def test_a_whole_picture_of_the_right_size_is_cut_as_all_are(folders):
    task = image_task(folders, augmentation=("resized_crop",))
    pixels = Pixels(16, (0.5,) * 3, (0.5,) * 3, resized=20, keeps_shape=True)
    rows = task.splits["train"]
    whole = rows.inputs[0].decoded()
    (images,) = task.encode(rows, pixels).batch([0])["inputs"]
    expected = pixels.normalised(torch.tensor(pixels.fit(whole)).permute(2, 0, 1)[None])
    assert whole.shape == (16, 16, 3)
    assert torch.equal(images, expected)


def test_what_does_not_fit_into_memory_is_decoded_each_time(folders, monkeypatch):
    task = image_task(folders)
    kept = training_images(task)
    monkeypatch.setattr("limbeck.tasks.pictures.KEPT_BYTES", 0)
    examples = task.encode(task.splits["train"], None)
    assert examples.items.kept is None
    assert same(kept, training_images(task))


def test_augmenting_leaves_the_store_as_it_is():
    image = torch.arange(768, dtype=torch.uint8).reshape(3, 16, 16)
    example = {"inputs": image, "labels": 1}
    before = image.clone()
    changed = Augment(("crop", "flip"), 16, "inputs")(example, np.random.default_rng(1))
    assert torch.equal(example["inputs"], before)
    assert not torch.equal(changed["inputs"], before)


class Recorded(nn.Module):
    """A linear classifier that keeps what it was called with."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(3 * 16 * 16, 2)
        self.seen = []

    def forward(self, x):
        if torch.is_grad_enabled() == self.training:
            self.seen.append(x.detach().clone())
        return self.inner(x.flatten(1))


def test_teacher_and_student_see_the_same_pixels(folders):
    task = image_task(folders)
    student, teacher = Recorded(), Recorded(1)
    teacher.seen = student.seen  # both write into one list, in turns
    distiller = Distiller(student, teacher, [Term("logits", loss="forward_kl")])
    fit(distiller, task.encode(task.splits["train"], None), settings=Settings(steps=4, batch_size=8))
    assert len(student.seen) >= 8
    pairs = list(zip(student.seen[-8::2], student.seen[-7::2], strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(pairs[0][0], pairs[1][0])


class Stop(limbeck.Callback):
    """Breaks a training off as an error would."""

    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise RuntimeError("pulled the plug")


def test_an_augmented_training_resumes_bit_for_bit(folders, tmp_path):
    task = image_task(folders)
    data = task.encode(task.splits["train"], None)
    settings = Settings(epochs=3, batch_size=6, learning_rate=0.01, checkpoint_every=1)

    def train(folder, *callbacks):
        distiller = Distiller(Recorded(), Recorded(1), [Term("logits", loss="forward_kl")])
        fit(distiller, data, settings=settings, folder=tmp_path / folder, callbacks=callbacks)
        return distiller.export().state_dict()

    whole = train("a")
    for step in (2, 5):  # in the middle of the first and of the second epoch
        with pytest.raises(RuntimeError, match="plug"):
            train("b", Stop(step))
    resumed = train("b")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    plain = Examples(data.items, data.collate)
    distiller = Distiller(Recorded(), Recorded(1), [Term("logits", loss="forward_kl")])
    fit(distiller, plain, settings=settings)
    assert not torch.equal(distiller.export().inner.weight, whole["inner.weight"])


# ---- models -----------------------------------------------------------------------------------------------------


def test_models_from_a_configuration(folders):
    task = image_task(folders)
    made = load_model(task, "transformers:resnet", TINY, seed=0)
    assert made.model.config.id2label == dict(enumerate(CLASSES))
    assert made.processor == task.pixels
    assert not made.head_is_trained
    again = load_model(task, "transformers:resnet", TINY, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = load_model(task, "transformers:vit", {**small, "patch_size": 4}, seed=0)
    assert vit.model.config.image_size == 16
    assert vit.model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 2)
    convnext = load_model(task, "transformers:convnext", {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4}, seed=0)
    assert convnext.model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_models_that_cannot_be_made(folders):
    task = image_task(folders)
    with pytest.raises(ValueError, match="transformers has no image classifier 'resnt'; did you mean 'resnet'"):
        load_model(task, "transformers:resnt", {}, seed=0)
    with pytest.raises(TypeError, match="transformers:resnet has no option 'depth'; did you mean 'depths'"):
        load_model(task, "transformers:resnet", {"depth": [1]}, seed=0)
    with pytest.raises(ValueError, match="transformers:resnet cannot be made with"):
        load_model(task, "transformers:resnet", {"layer_type": "square"}, seed=0)
    with pytest.raises(ValueError, match=r"timm:resnet18 needs timm .*pip install 'limbeck\[vision\]'"):
        load_model(task, "timm:resnet18", {}, seed=0)
    with pytest.raises(ValueError, match="transformers:resnet reads images, and the task docstrings has none"):
        load_model(make_task(TaskOptions(name="docstrings", train_examples=50)), "transformers:resnet", {}, seed=0)


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm: the few functions that are called, with their real names and results."""

    class Network(nn.Module):
        def __init__(self, num_classes, width=4):
            super().__init__()
            self.head = nn.Linear(3, num_classes)

        def forward(self, x):
            return self.head(x.mean((2, 3)))

    def create_model(name, pretrained=False, num_classes=1000, **options):
        assert name == "resnet18"
        return Network(num_classes, **options)

    config = {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.95,
        "crop_mode": "center",
    }
    module = types.ModuleType("timm")
    module.create_model = create_model
    module.is_model = lambda name: name == "resnet18"
    module.list_models = lambda: ["resnet18", "resnet34"]
    module.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)
    monkeypatch.setitem(sys.modules, "timm", module)


def test_models_of_timm(folders, timm):
    task = image_task(folders)
    made = load_model(task, "timm:resnet18", {}, seed=0)
    assert made.model.head.out_features == 2
    assert made.processor == task.pixels
    pretrained = load_model(task, "timm:resnet18", {"pretrained": True}, seed=0)
    assert (pretrained.processor.size, pretrained.processor.resized) == (224, 236)
    assert pretrained.processor.keeps_shape
    with pytest.raises(ValueError, match="timm has no model 'resnet8'; did you mean"):
        load_model(task, "timm:resnet8", {}, seed=0)
    with pytest.raises(ValueError, match="timm:resnet18 cannot be made with"):
        load_model(task, "timm:resnet18", {"widht": 3}, seed=0)
    with pytest.raises(ValueError, match=r"reads images as .*, and the teacher as .*preprocessor_config.json"):
        make_student(StudentSpec(model="timm:resnet18", options={"pretrained": True}), task, made, seed=0)


def save_resnet(folder, names, processor=None, model_class=ResNetForImageClassification):
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    torch.manual_seed(0)
    model_class(ResNetConfig(**TINY, **labels)).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def test_models_from_a_folder(folders, tmp_path):
    task = image_task(folders)
    own = task.load(save_resnet(tmp_path / "own", CLASSES, PROCESSORS["shorter"]))
    assert own.head_is_trained
    assert (own.processor.size, own.processor.mean) == (24, (0.1, 0.2, 0.3))
    assert image_task(folders, size=48).load(tmp_path / "own").processor.resized == 54
    backbone = load_model(task, str(save_resnet(tmp_path / "body", CLASSES, model_class=ResNetModel)), {}, seed=0)
    assert not backbone.head_is_trained
    assert backbone.processor == task.pixels
    thousand = task.load(save_resnet(tmp_path / "many", [f"class {i}" for i in range(7)]))
    assert not thousand.head_is_trained
    assert thousand.model.config.id2label == dict(enumerate(CLASSES))
    with pytest.raises(ValueError, match="was trained for the labels"):
        task.load(save_resnet(tmp_path / "swapped", CLASSES[::-1]))


def convolutional(task, *, width=4):
    """A plain module, as a user has it."""
    layers = [
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, len(task.labels)),
    ]
    return nn.Sequential(*layers)


# ---- whole runs -------------------------------------------------------------------------------------------------

FAST = {"epochs": 1, "batch_size": 8}


def run(data, out, teacher, student, **parts):
    recipe = {
        "task": {"name": "image", "data": str(data), **parts.pop("task", {})},
        "teacher": {"training": FAST, **teacher},
        "student": student,
        "training": FAST,
        "store": str(out.parent / "store"),
        **parts,
    }
    return limbeck.distill(recipe, out)


def test_a_large_resnet_teaches_a_small_one(tmp_path):
    """ResNet-50 to ResNet-18 in shape, with everything narrower, as in the image examples of other toolkits."""
    save_folders(tmp_path / "data" / "train", 12, size=(32, 32))
    save_folders(tmp_path / "data" / "test", 6, seed=1, size=(32, 32))
    large = {"depths": [3, 4, 6, 3], "layer_type": "bottleneck", "hidden_sizes": [16, 32, 48, 64]}
    small = {"depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_sizes": [8, 8, 16, 16]}
    arguments = (
        tmp_path / "data",
        tmp_path / "run",
        {"model": "transformers:resnet", "options": {"embedding_size": 8, **large}},
        {"model": "transformers:resnet", "options": {"embedding_size": 8, **small}},
    )
    hint = {"tap": "resnet.encoder.stages.2", "loss": "mse", "project": "conv1x1", "weight": 0.1}
    kd = {"loss": "forward_kl", "temperature": 4.0}
    report = run(*arguments, terms={"kd": kd, "hint": hint, "labels": {"tap": "labels", "loss": "cross_entropy"}})
    assert report.student.parameters < report.teacher.parameters
    assert report.examples == {"train": 24, "validation": 12}
    student = str(tmp_path / "run" / "student")
    script = (
        "import sys; sys.modules['limbeck'] = None\n"
        "import numpy as np, torch\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageClassification as M, AutoImageProcessor as P\n"
        f"m, p = M.from_pretrained({student!r}), P.from_pretrained({student!r})\n"
        "x = p(Image.fromarray(np.zeros((40, 32, 3), np.uint8)), return_tensors='pt')\n"
        "print(m.config.depths, m.config.id2label[1], m(**x).logits.shape, tuple(x['pixel_values'].shape))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[2, 2, 2, 2] red torch.Size([1, 2]) (1, 3, 32, 32)"


def test_a_teacher_is_trained_once_and_kept(folders, tmp_path):
    teacher = {
        "model": str(save_resnet(tmp_path / "many", [f"class {i}" for i in range(7)], PROCESSORS["shorter"]))
    }
    student = {"model": "tests.test_tasks_image:convolutional", "options": {"width": 6}}
    first = run(folders, tmp_path / "a", teacher, student, task={"augmentation": ["flip"]})
    assert first.teacher.training_seconds > 0
    second = run(folders, tmp_path / "b", teacher, student, task={"augmentation": ["flip"]})
    assert second.teacher.training_seconds == 0
    assert second.teacher.score == first.teacher.score
    assert second.student.score == first.student.score
    assert load_pixels(tmp_path / "a" / "student").mean == (0.1, 0.2, 0.3)
    weights = load_file(tmp_path / "a" / "student" / "model.safetensors")
    assert weights["0.weight"].shape == (6, 3, 3, 3)
    third = run(folders, tmp_path / "c", teacher, student, task={"augmentation": []})
    assert third.teacher.training_seconds > 0  # it was shown other images


def test_layers_of_an_image_teacher(folders, tmp_path):
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    teacher = {"model": "transformers:vit", "options": {**options, "patch_size": 4}}
    report = run(folders, tmp_path / "run", teacher, {"layers": [1]})
    assert report.student.parameters < report.teacher.parameters
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student")
    assert model.config.num_hidden_layers == 1


def test_the_command(folders, tmp_path, monkeypatch, capsys):
    from limbeck import cli

    words = ["distill", "--task", "image", "--data", folders, "--teacher", "transformers:resnet"]
    words += ["--student", "transformers:resnet", "--out", tmp_path / "run"]
    for side in ("teacher", "student"):
        words += [part for k, v in TINY.items() for part in ("--set", f"{side}.options.{k}={v}")]
    words += ["--set", "training.epochs=1", "--set", "teacher.training.epochs=1", "--set", f"store={tmp_path}"]
    words += ["--set", "student.options.hidden_sizes=[4, 8]", "--set", "task.augmentation=[crop]"]
    monkeypatch.setattr(sys, "argv", ["limbeck", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, capsys.readouterr()
    assert isinstance(make_task(limbeck.Recipe.load(tmp_path / "run" / "recipe.yaml").task), PictureTask)
