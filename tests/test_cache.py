"""Kept signals: cut and joined, found by content, whole on disk or not there, and a teacher that runs once."""

import copy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck import Distiller, Settings, Term, fit
from limbeck.cache import Store, cut, example_keys, join, kind_of, merge, prune, verify, weights_digest
from limbeck.cache.store import MANIFEST
from limbeck.teachers import Cached, ModuleTeacher
from tests.models import bert, pad, text_batch

BELONGS = {"teacher": "a", "dtype": "fp32"}


def keys(count, start=0):
    return [bytes([start + i]) * 16 for i in range(count)]


def filled(folder=None, count=6, start=0, **options):
    store = Store(BELONGS, folder, **options)
    put(store, count, start)
    return store


def put(store, count=6, start=0):
    logits = [torch.full((3,), float(start + i)) for i in range(count)]
    hidden = [torch.arange(2.0 * (1 + i)).view(1 + i, 2) for i in range(count)]
    attention = [torch.arange(4.0 * (1 + i) ** 2).view(1 + i, 1 + i, 4) for i in range(count)]
    kinds = {"logits": "row", "hidden": "tokens", "attention": "pairs"}
    store.put(keys(count, start), kinds, {"logits": logits, "hidden": hidden, "attention": attention})


def content(store, count=6, start=0):
    return [store.get(key, tap) for key in keys(count, start) for tap in ("logits", "hidden", "attention")]


def same(ours, theirs):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(ours, theirs, strict=True))


# ---- cut and joined --------------------------------------------------------------------------------------------

MASKS = {
    "none": torch.ones(3, 4),
    "right": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]),
    "holes": torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]]),
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 6), (3, 2, 4, 4), (3, 5, 2, 3)])
def test_joined_again_all_valid_positions_are_what_they_were(shape, padding):
    mask = MASKS[padding]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kind = kind_of(values.shape, mask)
    again = join(cut(values, kind, mask), kind, mask)
    assert again.shape == values.shape
    valid = mask.bool()
    if kind == "tokens":
        values = values * valid[:, :, None]
    if kind == "pairs":
        values = values * (valid[:, None, :, None] & valid[:, None, None, :])
    assert torch.equal(again, values)


def test_examples_come_together_in_other_batches_with_other_padding():
    batch = text_batch(4, 7)
    hidden = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))
    pieces = cut(hidden, "tokens", batch["attention_mask"])
    mask = torch.nn.functional.pad(batch["attention_mask"], (2, 1))[[2, 0]]
    joined = join([pieces[2], pieces[0]], "tokens", mask)
    assert torch.equal(joined[mask.bool()], torch.cat([pieces[2], pieces[0]]))
    assert not joined[~mask.bool()].any()


def test_an_example_of_another_length_is_not_joined():
    with pytest.raises(ValueError, match="an example of 2 positions was kept with 3"):
        join([torch.zeros(3, 4)], "tokens", torch.ones(1, 2))


# ---- found by content ------------------------------------------------------------------------------------------


def test_padding_labels_and_numbers_of_examples_are_no_content():
    batch = text_batch(4, 7)
    other = {**pad(batch, 3), "labels": batch["labels"] + 1, "example_id": torch.arange(4)}
    assert (example_keys(batch) == example_keys(other)).all()


@pytest.mark.parametrize("change", ["input_ids", "attention_mask", "dtype", "name"])
def test_whatever_a_teacher_sees_is_content(change):
    batch = text_batch(4, 7)
    other = {key: tensor.clone() for key, tensor in batch.items()}
    if change == "dtype":
        other["input_ids"] = other["input_ids"].int()
    elif change == "name":
        other["token_type_ids"] = torch.zeros_like(other["input_ids"])
    else:
        other[change][0, 2] = 0 if change == "attention_mask" else 39 - other[change][0, 2]
    assert example_keys(batch)[0] != example_keys(other)[0]
    assert len({key.tobytes() for key in example_keys(batch)}) == 4


def test_positional_inputs_are_content():
    first, second = torch.ones(2, 3), torch.zeros(2, 3)
    keys = [example_keys({"inputs": pair}) for pair in ((first, second), (second, first))]
    assert (keys[0] != keys[1]).all()


def test_any_weight_or_buffer_changes_the_digest():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    digests = {weights_digest(model)}
    for tensor in model.state_dict().values():
        tensor += 1
        digests.add(weights_digest(model))
    assert len(digests) == 1 + len(model.state_dict())
    assert weights_digest(copy.deepcopy(model)) in digests


# ---- on disk ---------------------------------------------------------------------------------------------------


def test_what_was_put_in_comes_out(tmp_path):
    memory, disk = filled(), filled(tmp_path)
    assert same(content(disk), content(memory))
    disk.flush()
    assert same(content(disk), content(memory))
    assert same(content(Store(BELONGS, tmp_path)), content(memory))
    assert len(disk) == len(memory) == 6


def test_shards_are_written_as_they_fill(tmp_path):
    store = Store(BELONGS, tmp_path, shard_bytes=64)
    for start in range(0, 40, 4):
        put(store, 4, start)
    store.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 10
    again = Store(BELONGS, tmp_path)
    assert len(again) == 40
    assert again.get(keys(1, 37)[0], "logits").tolist() == [37.0] * 3


def test_taps_may_come_one_after_the_other(tmp_path):
    store = Store(BELONGS, tmp_path)
    store.put(keys(2), {"a": "row"}, {"a": [torch.zeros(1), torch.ones(1)]})
    store.flush()
    store.put(keys(2), {"a": "row", "b": "row"}, {"a": [torch.zeros(1)] * 2, "b": [torch.ones(1)] * 2})
    store.flush()
    again = Store(BELONGS, tmp_path)
    assert [again.get(key, tap).item() for key in keys(2) for tap in "ab"] == [0.0, 1.0, 1.0, 1.0]


def test_several_writers_see_each_other(tmp_path):
    first, second = Store(BELONGS, tmp_path), Store(BELONGS, tmp_path)
    put(first, 3)
    put(second, 3, start=3)
    first.flush()
    second.flush()
    first.refresh()
    assert len(first) == 6
    assert same(content(first, 3, 3), content(filled(), 3, 3)) or len(content(first, 3, 3)) == 9
    assert first.get(keys(1, 4)[0], "logits").tolist() == [4.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_survives(tmp_path, dtype):
    store = Store(BELONGS, tmp_path)
    values = [torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 0, 1]).to(dtype)]
    store.put(keys(2), {"x": "row"}, {"x": values})
    store.flush()
    again = Store(BELONGS, tmp_path)
    assert same([again.get(key, "x") for key in keys(2)], values)


def test_examples_without_positions(tmp_path):
    store = Store(BELONGS, tmp_path)
    store.put(keys(2), {"x": "tokens"}, {"x": [torch.zeros(0, 4), torch.ones(2, 4)]})
    store.flush()
    assert [tuple(Store(BELONGS, tmp_path).get(key, "x").shape) for key in keys(2)] == [(0, 4), (2, 4)]


# ---- what is wrong ---------------------------------------------------------------------------------------------


def test_another_teachers_cache_is_refused_and_both_are_named(tmp_path):
    filled(tmp_path).flush()
    with pytest.raises(ValueError, match=r"signals of another teacher \(teacher: 'a' there, 'b' here\)"):
        Store({**BELONGS, "teacher": "b"}, tmp_path)


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match=r"is no cache of limbeck, it holds 'thesis\.tex'"):
        Store(BELONGS, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_format_is_refused(tmp_path):
    filled(tmp_path).flush()
    manifest = tmp_path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="has the format 9, and this limbeck reads 1"):
        Store(BELONGS, tmp_path)


def found_wrong(folder):
    """Whether a cache is refused, or something in it is listed as wrong."""
    try:
        return bool(verify(folder))
    except ValueError as refusal:
        return "damaged" in str(refusal) or "format" in str(refusal)


def test_every_flipped_byte_is_found(tmp_path):
    filled(tmp_path, 2).flush()
    files = sorted(tmp_path.iterdir())
    assert verify(tmp_path) == []
    for file in files:
        whole = file.read_bytes()
        step = 1 if file.name == MANIFEST else 7
        for place in range(0, len(whole), step):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert found_wrong(tmp_path), f"byte {place} of {file.name}"
        file.write_bytes(whole)
    assert verify(tmp_path) == []


def test_a_damaged_shard_is_found_when_it_is_read_and_prune_removes_it(tmp_path):
    filled(tmp_path, 3).flush()
    (shard,) = tmp_path.glob("*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-3] + b"abc")
    store = Store(BELONGS, tmp_path)
    with pytest.raises(ValueError, match="is damaged; limbeck cache prune removes it"):
        store.get(keys(1)[0], "logits")
    assert prune(tmp_path) == [shard.name]
    assert len(Store(BELONGS, tmp_path)) == 0


def test_prune_removes_what_was_not_finished_or_stands_twice(tmp_path):
    one = filled(tmp_path, 3)
    one.flush()
    twice = Store(BELONGS, tmp_path / "other")
    put(twice, 3)
    twice.flush()
    merge(tmp_path, [tmp_path / "other"])
    (tmp_path / "x.safetensors.partial").write_bytes(b"1")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert len(prune(tmp_path)) == 2
    assert same(content(Store(BELONGS, tmp_path), 3), content(filled(count=3), 3))


def test_merge_brings_caches_together_but_of_one_teacher_only(tmp_path):
    filled(tmp_path / "a", 3).flush()
    filled(tmp_path / "b", 3, start=3).flush()
    assert merge(tmp_path / "both", [tmp_path / "a", tmp_path / "b"]) == 2
    assert merge(tmp_path / "both", [tmp_path / "a"]) == 0
    assert len(Store(BELONGS, tmp_path / "both")) == 6
    Store({**BELONGS, "teacher": "b"}, tmp_path / "c")
    with pytest.raises(ValueError, match="different teachers"):
        merge(tmp_path / "all", [tmp_path / "a", tmp_path / "c"])


BUILDER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from limbeck.cache import Store
from tests.test_cache import BELONGS, keys, put
folder = Path(sys.argv[1])
store = Store(BELONGS, folder, shard_bytes=200)
for start in range(0, 120, 4):
    if not all(store.holds(key, "logits") for key in keys(4, start)):
        put(store, 4, start)
    print(start, flush=True)
store.flush()
print("done", flush=True)
"""


def test_a_killed_builder_goes_on_and_ends_with_the_same_content(tmp_path):
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", BUILDER.format(root=root), str(tmp_path / "cache")]
    for stop in (8, 40, 100):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.strip() == str(stop):
                time.sleep(0.001 * stop)
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        process.stdout.close()
    subprocess.run(command, check=True, capture_output=True)
    store = Store(BELONGS, tmp_path / "cache")
    whole = Store(BELONGS)
    for start in range(0, 120, 4):
        put(whole, 4, start)
    assert same(content(store, 120), content(whole, 120))
    prune(tmp_path / "cache")
    assert verify(tmp_path / "cache") == []


# ---- the teacher runs once -------------------------------------------------------------------------------------


def cached(teacher, store=None, dtype="fp32"):
    return Cached(ModuleTeacher(teacher), Store({}) if store is None else store, dtype)


TAPS = ["logits", "hidden_states.1", "attentions.0"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_is_kept_is_what_the_teacher_says(dtype):
    teacher = bert(attn_implementation="eager").eval()
    batch = text_batch(4, 7)
    live = ModuleTeacher(teacher).signal(batch, TAPS)
    ours = cached(teacher, dtype=dtype)
    first, second = ours.signal(batch, TAPS), ours.signal(pad(batch, 2), TAPS)
    valid = batch["attention_mask"].bool()
    bound = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11}[dtype]
    for tap, kept in (("logits", first["logits"]), ("hidden_states.1", first["hidden_states.1"][valid])):
        expected = live[tap] if tap == "logits" else live[tap][valid]
        torch.testing.assert_close(kept.float(), expected, rtol=bound, atol=1e-6 if bound else 0)
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    torch.testing.assert_close(
        first["attentions.0"].float() * pairs, live["attentions.0"] * pairs, rtol=bound, atol=1e-6 if bound else 0
    )
    assert torch.equal(second["hidden_states.1"][:, :7], first["hidden_states.1"])
    assert (ours.asked, ours.computed) == (8, 4)


def test_only_the_missing_examples_are_computed():
    ours = cached(bert().eval())
    batch = text_batch(4, 7)
    part = {key: tensor[:2] for key, tensor in batch.items()}
    kept = ours.signal(part, ["logits"])["logits"]
    out = ours.signal(batch, ["logits"])["logits"]
    assert ours.computed == 4
    assert torch.equal(out[:2], kept)


def test_without_a_teacher_missing_examples_are_counted(tmp_path):
    store = Store({}, tmp_path)
    batch = text_batch(4, 7)
    cached(bert().eval(), store).signal(batch, ["logits"])
    alone = Cached(None, store)
    assert alone.offers("logits")
    assert not alone.offers("hidden_states.1")
    assert alone.signal(batch, ["logits"])["logits"].shape == (4, 3)
    with pytest.raises(ValueError, match="3 of 3 examples of a batch are not in the cache"):
        alone.signal(text_batch(3, 7, seed=9), ["logits"])


def trained(teacher, terms, **settings):
    batch = text_batch(24, 7)
    data = [{key: tensor[i] for key, tensor in batch.items()} for i in range(24)]
    student = bert(layers=1, seed=4)
    chosen = Settings(epochs=3, batch_size=8, learning_rate=0.05, optimizer="sgd", **settings)
    fit(Distiller(student, teacher, terms), data, settings=chosen)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.mark.parametrize("settings", [{}, {"accumulation": 2}])
def test_training_from_the_cache_equals_training_with_the_teacher(settings):
    terms = [
        Term("logits", loss="forward_kl", temperature=2.0),
        Term("bert.encoder.layer.0", "bert.encoder.layer.1", loss="mse", name="hidden"),
    ]
    teacher = bert().eval()
    ours = cached(teacher)
    from_cache, live = trained(ours, terms, **settings), trained(ModuleTeacher(teacher), terms, **settings)
    torch.testing.assert_close(from_cache, live, rtol=1e-5, atol=1e-6)
    assert ours.computed == 24
    assert ours.asked >= 72
