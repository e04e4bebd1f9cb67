"""Forms in which signals are kept: what comes back, what it takes, and what is refused."""

import math

import pytest
import torch
from torch import nn

from limbeck.batch import view
from limbeck.cache import (
    Dense,
    HybridForm,
    SampledForm,
    Store,
    TopKForm,
    describe,
    example_keys,
    kept_by,
    read_manifest,
)
from limbeck.cache.folder import FORMAT, MANIFEST
from limbeck.cache.forms import from_description
from limbeck.cache.pack import pack, unpack, width
from limbeck.sparse import top_k
from limbeck.teachers import Cached, Identified, ModuleTeacher
from limbeck.types import Sampled, Signal, TopK
from tests.models import bert, pad, text_batch


def numbered(count, start=0):
    return [int(i).to_bytes(12, "big") for i in range(start, start + count)]


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def through(form, values, mask=None, folder=None, keys=None):
    """What comes back of values that were kept, in memory or on disk."""
    keys = numbered(len(values)) if keys is None else keys
    store = Store({}, folder)
    store.put(keys, {"logits": kept_by(form, values, mask, keys)})
    store.flush()
    store = store if folder is None else Store({}, folder)
    return store.read(keys, ["logits"], mask)["logits"]


MASKS = {
    "none": None,
    "right": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]),
    "holes": torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]]),
}
FORMS = [TopKForm(5), TopKForm(5, (1.0, 2.0), "fp32"), SampledForm(20), SampledForm(300, (1, 3)), HybridForm(3, 4)]


# ---- small numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2, 256, 257, 1 << 16, (1 << 16) + 1, 151_936, 1 << 24, (1 << 24) + 1, 1 << 32])
def test_numbers_take_as_few_bytes_as_they_need_and_come_back(limit):
    chosen = torch.cat([torch.tensor([0, 1, limit // 2, limit - 1]), torch.randint(limit, (50,))])
    planes = pack(chosen, limit)
    assert torch.equal(unpack(planes), chosen)
    least = math.ceil(math.log2(limit) / 8)
    assert sum(plane.element_size() for plane in planes) == width(limit) == least


def test_a_number_out_of_range_is_not_packed():
    with pytest.raises(ValueError, match="numbers from -1 to 3 are not all below 10"):
        pack(torch.tensor([-1, 3]), 10)


# ---- what comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", MASKS)
def test_the_largest_logits_come_back_at_their_positions(padding, tmp_path):
    mask = MASKS[padding]
    logits = random(3, 4, 70_000)
    expected = top_k(logits, 6, (1.0, 2.0))
    found = through(TopKForm(6, (1.0, 2.0), "fp32"), logits, mask, tmp_path)
    valid = torch.ones(3, 4, dtype=torch.bool) if mask is None else mask.bool()
    assert isinstance(found, TopK)
    assert (found.shape, found.temperatures) == (logits.shape, (1.0, 2.0))
    for ours, theirs in ((found.ids, expected.ids), (found.values, expected.values)):
        assert torch.equal(ours[valid], theirs[valid])
    torch.testing.assert_close(found.log_rest[valid], expected.log_rest[valid])
    assert not found.ids[~valid].any()


def test_half_precision_keeps_large_probabilities_to_a_thousandth():
    """The bounds in the docstring of TopKForm, at logits far from zero and at both temperatures."""
    logits = random(2000, 4000, scale=3.0).double() + 500
    logits[:, :3] += torch.rand(2000, 3, generator=torch.Generator().manual_seed(1)).double() * 30
    found = through(TopKForm(32, (1.0, 4.0)), logits.float())
    assert found.values.dtype == torch.float16
    for column, temperature in enumerate((1.0, 4.0)):
        exact = (logits.float().double() / temperature).softmax(-1).gather(1, found.ids)
        scaled = found.values.double() / temperature
        total = torch.logaddexp(scaled.logsumexp(-1), found.log_rest[:, column].double())
        error = ((scaled - total[:, None]).exp() / exact - 1).abs()
        assert error[exact > 0.1].max() <= 2**-10
        assert error[exact > 1e-6].max() <= 2**-7
        rest = (found.log_rest[:, column].double() - total).exp()
        torch.testing.assert_close(rest, 1 - exact.sum(-1), rtol=2**-9, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_temperature_that_was_not_kept_is_refused(form):
    found = through(form, random(2, 100))
    assert found.column(form.temperatures[-1]) == len(form.temperatures) - 1
    with pytest.raises(ValueError, match="and not at 7"):
        found.column(7.0)


def drawn_by_hand(logits, form, key):
    """An example's draws: from the same source, with no store between."""
    import hashlib

    from limbeck.sparse import sample

    digest = hashlib.blake2b(key, digest_size=8, salt=form.seed.to_bytes(8, "little")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return sample(logits, form.draws, form.temperatures, generator, getattr(form, "k", 0))


def weights_of(sampled):
    """(N, V, T), what all entries weigh."""
    dense = torch.zeros(sampled.ids.shape[0], sampled.size, len(sampled.temperatures))
    index = sampled.ids[:, :, None].expand(-1, -1, dense.shape[-1])
    return dense.scatter_add(1, index, sampled.weights)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("form", FORMS[2:], ids=str)
def test_draws_come_back_at_their_positions(form, padding, tmp_path):
    mask = MASKS[padding]
    logits = random(3, 4, 500, scale=2.0)
    found = through(form, logits, mask, tmp_path)
    assert isinstance(found, Sampled)
    assert found.shape == logits.shape
    for row, key in enumerate(numbered(3)):
        valid = torch.ones(4, dtype=torch.bool) if mask is None else mask[row].bool()
        assert not found.weights[row][~valid].any()
        if valid.any():
            expected = weights_of(drawn_by_hand(logits[row][valid], form, key))
            # the first temperature of plain draws is exact, all else has the bound of a logarithm in fp16
            torch.testing.assert_close(weights_of(found[row][valid]), expected, rtol=2**-8, atol=1e-7)
    if isinstance(form, SampledForm):
        counts = found.weights[..., 0] * form.draws
        torch.testing.assert_close(counts, counts.round(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS[2:], ids=str)
def test_the_draws_of_an_example_do_not_depend_on_its_batch(form):
    logits = random(6, 5, 300)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 1, 2, 5])[:, None]).long()
    together = weights_of(through(form, logits, mask)[2])
    other = nn.functional.pad(logits[[4, 2]], (0, 0, 1, 2))
    other_mask = nn.functional.pad(mask[[4, 2]], (1, 2))
    keys = [numbered(6)[4], numbered(6)[2]]
    alone = weights_of(through(form, other, other_mask, keys=keys)[1])
    assert torch.equal(alone[1:6], together)
    again = through(form.__class__(**{**form.__dict__, "seed": 5}), logits, mask)
    assert not torch.equal(weights_of(again[2]), together)


def test_draws_weigh_their_probability_on_average():
    logits = random(1, 12, scale=2.0)
    expected = torch.stack([(logits[0] / t).softmax(-1) for t in (1.0, 2.0)], dim=-1)
    for form in (SampledForm(40, (1.0, 2.0)), HybridForm(3, 20, (1.0, 2.0))):
        found = weights_of(through(form, logits.expand(2000, -1)))
        error = found.std(0) / 2000**0.5
        assert ((found.mean(0) - expected).abs() <= 4.5 * error + 1e-3 * expected).all()


def test_a_teacher_that_knows_its_largest_logits_alone_is_kept_as_it_is():
    class Server:
        def offers(self, tap):
            return tap == "logits"

        def names(self):
            return ["logits"]

        def signal(self, batch, wants):
            chosen = top_k(batch["table"], 8, (1.0, 2.0))
            order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
            lower = chosen.values[:, order] - 3, chosen.log_rest - 3 / torch.tensor([1.0, 2.0])
            return Signal({"logits": TopK(chosen.ids[:, order], 90, chosen.temperatures, *lower)})

    batch = {"table": random(4, 90)}
    ours = Cached(Server())
    first, second = (ours.signal(batch, ["logits"])["logits"] for _ in range(2))
    exact = top_k(batch["table"], 8, (1.0, 2.0))
    assert ours.computed == 4
    assert torch.equal(first.ids, second.ids) and torch.equal(first.ids, exact.ids)  # noqa: PT018
    torch.testing.assert_close(first.values, exact.values)
    torch.testing.assert_close(first.log_rest, exact.log_rest)
    # fewer of them at one of the temperatures
    fewer = Cached(Server(), forms={"logits": TopKForm(5, (2.0,), "fp32")}).signal(batch, ["logits"])["logits"]
    torch.testing.assert_close(fewer.values, top_k(batch["table"], 5).values)
    torch.testing.assert_close(fewer.log_rest, top_k(batch["table"], 5, (2.0,)).log_rest)
    for form, words in (
        (TopKForm(9), "gives TopK of 8 entries, and 9 of the largest are to be kept"),
        (TopKForm(4, (3.0,)), "not at 3"),
        (SampledForm(4), "no dense values to draw from"),
        (Dense(), "name the form to keep them in"),
    ):
        with pytest.raises(ValueError, match=words):
            Cached(Server(), forms={"logits": form}).signal(batch, ["logits"])


def test_a_value_too_large_for_half_precision_is_an_error_and_minus_infinity_is_not():
    values = torch.tensor([[1.0, -math.inf, 3.0]])
    assert through(Dense("fp16"), values).tolist() == values.tolist()
    with pytest.raises(ValueError, match=r"a value of 1e\+05 is too large for fp16"):
        through(Dense("fp16"), torch.tensor([[1.0, 1e5]]))


@pytest.mark.parametrize("form", [*FORMS, Dense("bf16")], ids=str)
def test_a_form_is_what_its_description_says(form):
    assert from_description(describe(form, 7)) == form


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dense("fp8"), "unknown dtype 'fp8' for kept signals; known: fp32, bf16, fp16"),
        (lambda: TopKForm(0), "k is 0"),
        (lambda: SampledForm(3, ()), r"temperatures \[\] are not all positive"),
        (lambda: HybridForm(3, 0), "draws is 0"),
        (lambda: from_description({"form": "zip"}), "unknown form 'zip' of kept signals; known: dense, top-k"),
    ],
)
def test_a_form_that_cannot_be_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---- what it takes ---------------------------------------------------------------------------------------------


def bytes_on_disk(folder, form, examples, make, tokens=None):
    """All bytes of a folder, manifest and headers and keys included."""
    store = Store({"teacher": "a" * 32, "architecture": "b" * 32, "tokenizer": "c" * 32}, folder)
    for start in range(0, examples, 500):
        count = min(500, examples - start)
        mask, keys = None if tokens is None else torch.ones(count, tokens), numbered(count, start)
        store.put(keys, {"logits": kept_by(form, make(count), mask, keys)})
    store.flush()
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_class_logits_take_two_bytes_each_and_sixteen_an_example(tmp_path, classes):
    taken = bytes_on_disk(tmp_path, Dense("fp16"), 2000, lambda n: torch.zeros(n, classes))
    assert taken <= 2000 * (16 + 2 * classes)


def test_the_largest_32_of_a_large_vocabulary_take_196_bytes_a_token(tmp_path):
    def known(count):
        ids = torch.randint(151_936, (count, 20, 32))
        return TopK(ids, 151_936, (1.0,), -torch.rand(count, 20, 32), torch.zeros(count, 20, 1))

    taken = bytes_on_disk(tmp_path, TopKForm(32), 1000, known, tokens=20) / (1000 * 20)
    assert taken <= 196
    assert taken == pytest.approx(32 * 5 + 4, abs=1)


def test_fifty_draws_of_a_peaky_teacher_take_45_bytes_a_token(tmp_path):
    """About 11 of 50 draws are unique, as a language model's are; 2,000 entries take the bytes of 151,936."""
    teacher, unique = -1.82 * torch.arange(1, 2001).float().log(), []

    def make(count):
        keys, logits = numbered(count), teacher.expand(count, 20, 2000)
        counts = kept_by(SampledForm(50), logits[:20], torch.ones(20, 20), keys[:20]).parts["count"].flat
        unique.append(counts.float().mean().item())
        return logits

    taken = bytes_on_disk(tmp_path, SampledForm(50), 1000, make, tokens=20) / (1000 * 20)
    assert width(2000 * 50) == width(151_936 * 50) == 3
    assert 10.5 <= sum(unique) / len(unique) <= 12
    assert taken <= 45


def test_a_second_temperature_of_draws_takes_two_more_bytes_an_entry():
    logits = random(3, 2000, scale=3.0)
    sizes = []
    for temperatures in ((1.0,), (1.0, 2.0)):
        store = Store({})
        store.put(numbered(3), {"x": kept_by(SampledForm(50, temperatures), logits, None, numbered(3))})
        sizes.append(store.size("x")[0])
        entries = int(store.parts(numbered(3), ["x"])["x"]["count"].sum())
    assert sizes == [3 + 3 * entries, 3 + 5 * entries]


# ---- whose it is -----------------------------------------------------------------------------------------------


class Tokenized:
    """A teacher with a tokenizer."""

    def __init__(self, model, tokenizer="t"):
        self.live, self.tokenizer = ModuleTeacher(model), tokenizer
        self.offers, self.names, self.signal = self.live.offers, self.live.names, self.live.signal

    def identity(self):
        return {**self.live.identity(), "tokenizer": self.tokenizer}


KEPT = {"dtype": "fp16", "forms": {"logits": TopKForm(2, (1.0, 2.0))}}


@pytest.mark.parametrize(
    ("tokenizer", "seed", "changes", "words"),
    [
        ("t", 1, {}, "teacher: '.*' there, '.*' here"),
        ("u", 0, {}, "tokenizer: 't' there, 'u' here"),
        ("t", 0, {"dtype": "bf16"}, "kept in: 'fp16' there, 'bf16' here"),
        ("t", 0, {"forms": {"logits": TopKForm(3, (1.0, 2.0))}}, r"forms\.logits\.k: 2 there, 3 here"),
        ("t", 0, {"forms": {"logits": TopKForm(2, (1.0,))}}, r"temperatures: \[1.0, 2.0\] there, \[1.0\] here"),
        ("t", 0, {"forms": {"logits": TopKForm(2, (1.0, 2.0), "fp32")}}, r"dtype: 'fp16' there, 'fp32' here"),
        ("t", 0, {"forms": {"logits": SampledForm(2, (1.0, 2.0))}}, "form: 'top-k' there, 'sampled' here"),
        ("t", 0, {"forms": {}}, r"forms\.logits: {.*'form': 'top-k'.*} there, None here"),
        ("t", 0, {"forms": {**KEPT["forms"], "hidden_states.1": Dense("fp32")}}, r"forms\.hidden_states\.1: None"),
        ("t", 0, {"belongs": {"data": "rte"}}, "data: None there, 'rte' here"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_both_sides_are_named(tmp_path, tokenizer, seed, changes, words):
    batch = text_batch(4, 7)
    first = Cached(Tokenized(bert().eval()), tmp_path, **KEPT)
    first.signal(batch, ["logits"])
    first.store.flush()
    teacher = Tokenized(bert(seed=seed).eval(), tokenizer)
    with pytest.raises(ValueError, match=words):
        Cached(teacher, tmp_path, **{**KEPT, **changes})
    same = Cached(Tokenized(bert().eval()), str(tmp_path), **KEPT)
    assert torch.equal(same.signal(batch, ["logits"])["logits"].ids, first.signal(batch, ["logits"])["logits"].ids)
    assert same.computed == 0


def test_another_vocabulary_and_another_format_are_refused(tmp_path):
    class Wide(Tokenized):
        def __init__(self, model):
            super().__init__(model)
            self.signal = lambda batch, wants: Signal({"logits": torch.zeros(4, 9)})

    first = Cached(Tokenized(bert().eval()), tmp_path, forms={"logits": TopKForm(2)})
    first.signal(text_batch(4, 7), ["logits"])
    first.store.flush()
    wide = Cached(Wide(bert().eval()), tmp_path, forms={"logits": TopKForm(2)})
    with pytest.raises(ValueError, match=r"tap 'logits' is kept in another form \(size: 3 there, 9 here\)"):
        wide.signal(text_batch(4, 7, seed=5), ["logits"])
    manifest = tmp_path / MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(ValueError, match=f"has the format 1, and this limbeck reads {FORMAT}"):
        Cached(Tokenized(bert().eval()), tmp_path)


def test_a_store_of_the_users_own_holds_each_tap_in_one_form():
    store, batch = Store({}), text_batch(4, 7)
    Cached(ModuleTeacher(bert().eval()), store, forms={"logits": TopKForm(2)}).signal(batch, ["logits"])
    for other in ({"logits": TopKForm(3)}, {}):
        with pytest.raises(ValueError, match="tap 'logits' is kept in another form"):
            Cached(ModuleTeacher(bert().eval()), store, forms=other).signal(batch, ["logits"])


def test_a_teacher_that_cannot_say_who_it_is_needs_words_for_a_folder(tmp_path):
    class Nameless:
        def offers(self, tap):
            return True

        def names(self):
            return []

        def signal(self, batch, wants):
            return Signal(dict.fromkeys(wants, batch["x"]))

    with pytest.raises(TypeError, match=r"Nameless has no identity\(\).*belongs="):
        Cached(Nameless(), tmp_path)
    ours = Cached(Nameless(), tmp_path, belongs={"teacher": "mine"})
    ours.signal({"x": torch.ones(2, 3)}, ["x"])
    assert read_manifest(tmp_path)["teacher"] == "mine"
    assert isinstance(ours, Identified)


# ---- the teacher runs once -------------------------------------------------------------------------------------


def test_a_folder_alone_is_a_teacher(tmp_path):
    batch = text_batch(4, 7)
    ours = Cached(ModuleTeacher(bert().eval()), tmp_path, dtype="fp16", forms={"logits": TopKForm(2)})
    first = ours.signal(batch, ["logits", "hidden_states.1"])
    ours.store.flush()
    alone = Cached(None, tmp_path)
    again = alone.signal(pad(batch, 2), ["hidden_states.1", "logits"])
    assert torch.equal(again["logits"].values, first["logits"].values)
    assert torch.equal(again["hidden_states.1"][:, :7], first["hidden_states.1"])
    assert alone.identity() == read_manifest(tmp_path) == ours.identity()
    with pytest.raises(ValueError, match=r"is no cache of limbeck: there is no such folder"):
        Cached(None, tmp_path / "elsewhere")


class Texts:
    """A teacher of texts, which dies when it has had enough."""

    def __init__(self, enough=100):
        self.enough = enough

    def offers(self, tap):
        return tap == "logits"

    def names(self):
        return ["logits"]

    def identity(self):
        return {"teacher": "texts"}

    def signal(self, batch, wants):
        self.enough -= 1
        if self.enough < 0:
            raise ConnectionError("the server is gone")
        return Signal({"logits": torch.tensor([[float(len(text)), 0.0] for text in batch["text"]])})


def test_texts_are_content_and_what_a_dying_teacher_said_is_not_lost(tmp_path):
    batches = [{"text": [f"{i} {j}" * (1 + j) for j in range(3)], "labels": torch.zeros(3)} for i in range(4)]
    ours = Cached(Texts(enough=2), tmp_path)
    for batch in batches[:2]:
        ours.signal(batch, ["logits"])
    with pytest.raises(ConnectionError):
        ours.signal(batches[2], ["logits"])
    again = Cached(Texts(), tmp_path)
    found = [again.signal(batch, ["logits"])["logits"][:, 0].tolist() for batch in batches]
    assert again.computed == 6
    assert found == [[len(text) for text in batch["text"]] for batch in batches]
    assert len(set(map(bytes, example_keys({"text": ["a", "b", "a"]})))) == 2


def test_only_texts_that_are_missing_are_asked_for():
    ours = Cached(Texts())
    ours.signal({"text": ["a", "bb"], "labels": torch.zeros(2)}, ["logits"])
    found = ours.signal({"text": ["bb", "ccc", "a"], "labels": torch.zeros(3)}, ["logits"])["logits"]
    assert found[:, 0].tolist() == [2.0, 3.0, 1.0]
    assert ours.computed == 3


def test_a_view_of_a_batch_of_two_sides_is_kept_by_what_the_teacher_sees():
    ours = Cached(ModuleTeacher(bert().eval()))
    own = text_batch(4, 7)
    for seed in (1, 2):  # the student's side is another, the teacher's the same
        both = {"student": text_batch(4, 5, seed=seed), "teacher": own, "labels": own["labels"]}
        ours.signal(view(both, "teacher"), ["logits", "hidden_states.1"])
    assert (ours.asked, ours.computed) == (8, 4)


def test_positional_inputs_are_kept():
    ours = Cached(ModuleTeacher(nn.Linear(3, 2)))
    images = random(4, 3)
    first = ours.signal({"inputs": (images,), "labels": torch.zeros(4)}, ["logits"])["logits"]
    again = ours.signal({"inputs": (images[[2, 0]],)}, ["logits"])["logits"]
    assert torch.equal(again, first[[2, 0]])
    assert ours.computed == 4


def test_inputs_that_are_new_each_time_are_forgotten():
    ours = Cached(ModuleTeacher(nn.Linear(3, 2)))
    batch = {"input": random(4, 3)}
    first = ours.signal(batch, ["logits"])["logits"]
    ours.forget()
    assert len(ours.store) == 0
    assert torch.equal(ours.signal(batch, ["logits"])["logits"], first)
    assert len(ours.store) == 0
    assert (ours.asked, ours.computed) == (8, 8)


def test_what_comes_after_forgetting_is_in_the_form_that_came_before():
    ours = Cached(ModuleTeacher(nn.Linear(3, 9)), forms={"logits": TopKForm(2)})
    batch = {"input": random(4, 3)}
    before = ours.signal(batch, ["logits"])["logits"]
    ours.forget()
    for _ in range(2):
        after = ours.signal(batch, ["logits"])["logits"]
        assert torch.equal(after.values, before.values)
        assert len(ours._into) == len(ours.store) == 0
    assert (ours.asked, ours.computed) == (12, 12)


def test_what_is_on_disk_stays_when_inputs_are_forgotten(tmp_path):
    teacher = ModuleTeacher(nn.Linear(3, 2))
    ours = Cached(teacher, tmp_path)
    ours.signal({"input": random(4, 3)}, ["logits"])
    ours.store.flush()
    ours.signal({"input": random(4, 3, seed=1)}, ["logits"])
    ours.forget()
    assert len(ours.store) == 4
    assert Cached(teacher, tmp_path).signal({"input": random(4, 3)}, ["logits"])["logits"].shape == (4, 2)


def test_a_cache_of_a_cache_is_identified_by_both():
    inner = Cached(ModuleTeacher(nn.Linear(3, 2)), dtype="fp16")
    outer = Cached(inner, dtype="bf16")
    assert {**inner.identity(), **outer.identity()} == outer.identity() | {"forms": {}}
    assert outer.identity()["teacher"] == inner.teacher.identity()["teacher"]


def test_one_temperature_may_be_a_number():
    assert TopKForm(3, temperatures=2.0) == TopKForm(3, (2.0,))
    assert SampledForm(3, 2) == SampledForm(3, (2.0,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKForm(2.5), "k is 2.5; give a whole number"),
        (lambda: TopKForm("3"), "k is '3'; give a whole number"),
        (lambda: SampledForm(0.5), "draws is 0.5; give a whole number"),
        (lambda: HybridForm(2, 1.5), "draws is 1.5; give a whole number"),
        (lambda: TopKForm(3, "12"), "temperatures='12' are not numbers"),
        (lambda: TopKForm(3, ("1",)), "are not all positive numbers"),
        (lambda: TopKForm(3, None), "temperatures=None are not numbers"),
    ],
)
def test_wrong_counts_and_temperatures_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
