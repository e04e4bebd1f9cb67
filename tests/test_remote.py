import email.utils
import json
import math
import re
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers

from limbeck import Distiller, Term
from limbeck.cache import Store
from limbeck.losses import LOSSES
from limbeck.teachers import Cached, Client, Identified, Remote, Teacher
from limbeck.teachers.answers import FILE, Answers
from limbeck.teachers.replies import label_scores, log_rest, stated
from limbeck.testing import TeacherContract
from limbeck.types import TopK
from tests.models import text_batch
from tests.servers import Answer, Server, chat, vllm

V = 64
LABELS = ("negative", "positive")
PROMPT = "Review: {text}\nAnswer with one word."


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=V,
        initializer_range=0.3, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def server(llama):
    with Server(vllm(llama)) as running:
        yield running


class Clock:
    """A sleep that takes no time, and what was asked of it."""

    def __init__(self):
        self.slept = []

    def __call__(self, seconds):
        self.slept.append(seconds)


class Words:
    """A tokenizer of one word for each token."""

    words = (
        "pad",
        "this",
        "film",
        "is",
        "a",
        "joy",
        "bore",
        "and",
        "not",
        "so",
        "the",
        "good",
        "bad",
        "fine",
        "dull",
    )

    def __len__(self):
        return 40

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(self.words[i % len(self.words)] for i in ids if i or not skip_special_tokens)


def quick(url, clock=None, **options):
    """A client that does not wait."""
    return Client(url, sleep=clock or Clock(), **options)


def left_padded(batch):
    """The same examples with their padding in front."""
    rows = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    length = batch["input_ids"].shape[1]
    fill = [torch.full((length - len(row),), 17) for row in rows]
    ids = torch.stack([torch.cat([pad, row]) for pad, row in zip(fill, rows, strict=True)])
    return {"input_ids": ids, "attention_mask": batch["attention_mask"].flip(1)}


def own_log_probs(llama, batch):
    """The model's own, computed without a server and without padding: (L, V) for each example."""
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        with torch.no_grad():
            logits = llama(input_ids=ids[mask.bool()][None]).logits[0]
        yield torch.log_softmax(logits.double(), dim=-1)


def dense(known, index):
    """(..., V), the known log-probabilities and NaN elsewhere."""
    full = torch.full((*known.ids[index].shape[:-1], known.size), math.nan, dtype=torch.float64)
    return full.scatter(-1, known.ids[index], known.values[index].double())


# ---- every token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_entries_are_the_models_own_log_softmax(llama, server, side):
    batch = text_batch(5, 9) if side == "right" else left_padded(text_batch(5, 9))
    known = Remote(server.url, "llama", size=V, k=V).signal(batch, ["logits"])["logits"]
    assert isinstance(known, TopK)
    assert known.shape == (5, 9, V)
    assert known.temperatures == (1.0,)
    for row, expected in enumerate(own_log_probs(llama, batch)):
        valid = batch["attention_mask"][row].bool()
        torch.testing.assert_close(dense(known, row)[valid], expected, atol=1e-5, rtol=0)
        assert known.log_rest[row, valid].isneginf().all()


@pytest.mark.parametrize("k", [1, 7, V - 1])
def test_fewer_entries_are_the_largest_and_the_rest_is_what_all_others_hold(llama, server, k):
    batch = left_padded(text_batch(3, 8))
    known = Remote(server.url, "llama", size=V, k=k).signal(batch, ["logits"])["logits"]
    for row, expected in enumerate(own_log_probs(llama, batch)):
        valid = batch["attention_mask"][row].bool()
        values, ids = expected.topk(k)
        assert torch.equal(known.ids[row, valid], ids)
        torch.testing.assert_close(known.values[row, valid].double(), values, atol=1e-5, rtol=0)
        others = expected.scatter(-1, ids, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(
            known.log_rest[row, valid, 0].exp().double(), others.exp(), atol=1e-6, rtol=1e-3
        )


def test_padding_is_uniform_and_its_ids_are_different_ones(server):
    batch = text_batch(4, 9)
    known = Remote(server.url, "llama", size=V, k=5).signal(batch, ["logits"])["logits"]
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (known.ids[padding] == torch.arange(5)).all()
    torch.testing.assert_close(known.values[padding].exp(), torch.full_like(known.values[padding], 1 / V))
    torch.testing.assert_close(known.log_rest[padding].exp(), torch.full_like(known.log_rest[padding], 59 / V))


def test_an_example_of_padding_alone_is_not_sent(llama):
    batch = text_batch(2, 6)
    batch["attention_mask"][1] = 0
    with Server(vllm(llama)) as server:
        known = Remote(server.url, "llama", size=V, k=3).signal(batch, ["logits"])["logits"]
        assert [len(request.body["prompt"]) for request in server.requests] == [1]
    torch.testing.assert_close(known.values[1].exp(), torch.full((6, 3), 1 / V))


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 4), (3, 2), (16, 1)])
def test_chunks_and_requests_at_once_keep_the_order(llama, batch_size, workers):
    """The first request is answered last."""
    batch = text_batch(7, 6)
    prompts = [
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    complete = vllm(llama)

    def slow_at_first(request):
        time.sleep(0.1 if request.body["prompt"][0] == prompts[0] else 0.0)
        return complete(request)

    with Server(slow_at_first) as server:
        client = Client(server.url, workers=workers)
        known = Remote(client, "llama", size=V, k=V, batch_size=batch_size).signal(batch, ["logits"])["logits"]
        sizes = sorted(len(request.body["prompt"]) for request in server.requests)
    assert sizes == sorted(min(batch_size, 7 - at) for at in range(0, 7, batch_size))
    for row, expected in enumerate(own_log_probs(llama, batch)):
        torch.testing.assert_close(dense(known, row)[: len(expected)], expected, atol=1e-5, rtol=0)


def test_requests_are_really_made_at_once():
    """Each of three is answered only when all three are there."""
    together = threading.Barrier(3, timeout=10)

    def answer(request):
        together.wait()
        return chat(lambda _: "so")(request)

    with Server(answer) as server:
        assert Remote(Client(server.url, workers=3), "m").write(["a", "b", "c"], max_tokens=4) == ["so"] * 3


def test_the_request_leaves_no_sampling_setting_to_the_server(llama):
    with Server(vllm(llama)) as server:
        Remote(server.url + "/v1/", "llama", size=V, k=2, extra={"min_p": None, "priority": 3}).signal(
            {"input_ids": torch.tensor([[5, 6]])}, ["logits"]
        )
        request = server.requests[0]
    assert request.path == "/v1/completions"
    assert request.body == {
        "model": "llama", "prompt": [[5, 6]], "max_tokens": 1, "prompt_logprobs": 2, "logprobs": 2,
        "return_tokens_as_token_ids": True, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
        "repetition_penalty": 1.0, "priority": 3,
    }  # fmt: skip


def test_the_size_is_the_tokenizers_unless_given():
    assert Remote("http://h", "m", tokenizer=Words()).size == 40
    assert Remote("http://h", "m", tokenizer=Words(), size=50).size == 50


def test_log_rest_keeps_small_and_refuses_no_full_sums():
    tiny = torch.tensor([math.log1p(-1e-12)], dtype=torch.float64)
    assert log_rest(tiny, 2).exp().item() == pytest.approx(1e-12, rel=1e-3)
    assert log_rest(torch.tensor([0.0], dtype=torch.float64), 2).isneginf()
    above = torch.tensor([math.log(0.6), math.log(0.4 + 1e-7)], dtype=torch.float64)
    assert log_rest(above, 9).isneginf()


def test_what_rounding_has_put_above_one_is_one():
    row = {"7": {"logprob": 5e-5}, "3": {"logprob": -9999.0}}
    last = {"token_id:7": -0.5, "token_id:3": -2.0}
    reply = {"index": 0, "prompt_logprobs": [None, row], "logprobs": {"top_logprobs": [last]}}
    with Server(lambda _: {"choices": [reply]}) as server:
        teacher = Remote(server.url, "m", size=V, k=2)
        known = teacher.signal({"input_ids": torch.tensor([[5, 7]])}, ["logits"])["logits"]
    assert known.values[0].tolist() == [[0.0, -9999.0], [-0.5, -2.0]]
    assert known.log_rest[0, 0].item() == -math.inf


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"pixels": torch.zeros(2, 3)}, r"input_ids \(B, L\), and the batch has \['pixels'\]"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])},
            "example 1 has padding between its tokens",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)},
            r"\(2, 4\) and input_ids have",
        ),
    ],
)
def test_a_batch_that_cannot_be_sent_is_refused(batch, said):
    with pytest.raises(ValueError, match=said):
        Remote("http://127.0.0.1:9", "llama", size=V).signal(batch, ["logits"])


# ---- nonsense ---------------------------------------------------------------------------------------------------


def edited(llama, edit):
    """A server whose reply an edit has changed."""

    def answer(request):
        reply = vllm(llama)(request)
        return edit(reply) or reply

    return answer


def choice(reply):
    return next(choice for choice in reply["choices"] if choice["index"] == 0)


def rows(reply):
    return choice(reply)["prompt_logprobs"]


def first(reply):
    return rows(reply)[1]


def put(where, key, value):
    where[key] = value


NONSENSE = {
    "no JSON but '<html>": lambda r: Answer(b"<html>welcome</html>"),
    "a list where an object": lambda r: Answer([1]),
    "an error in place of choices": lambda r: Answer({"object": "error", "message": "no such thing"}),
    "it has no choices": lambda r: Answer({"object": "text_completion"}),
    "choices is 'none'": lambda r: Answer({"choices": "none"}),
    "1 choices for 2 prompts": lambda r: r["choices"].pop(),
    "its choices have the numbers \\[1\\]": lambda r: choice(r).update(index=1),
    "it has no prompt_logprobs": lambda r: choice(r).pop("prompt_logprobs") and None,
    "prompt_logprobs is 'None'": lambda r: choice(r).update(prompt_logprobs=None),
    "prompt_logprobs has 7 entries for a prompt of 6 tokens": lambda r: choice(r)["prompt_logprobs"].append({}),
    "it has no logprobs.top_logprobs.0": lambda r: choice(r).update(logprobs={"top_logprobs": []}),
    "names tokens by their text \\('a'\\)": lambda r: choice(r).update(logprobs={"top_logprobs": [{"a": -1.0}]}),
    "token 64, and the vocabulary has 64": lambda r: put(first(r), "64", {"logprob": -9.0}),
    "token -1, and": lambda r: put(first(r), "-1", {"logprob": -9.0}),
    "a token's log-probabilities are .*'x'": lambda r: put(rows(r), 1, {"x": {"logprob": -1.0}}),
    "a log-probability of nan": lambda r: first(r)[next(iter(first(r)))].update(logprob=math.nan),
    "a log-probability of 0.5": lambda r: first(r)[next(iter(first(r)))].update(logprob=0.5),
    "a log-probability of inf": lambda r: first(r)[next(iter(first(r)))].update(logprob=math.inf),
    "a token's log-probabilities are .*None": lambda r: first(r)[next(iter(first(r)))].update(logprob=None),
    "prompt_logprobs.1 is of another token": lambda r: put(rows(r), 1, {"0": {"logprob": -1.0}}),
    "1 log-probabilities at a token where 4": lambda r: [first(r).pop(key) for key in list(first(r))[1:]] and None,
    "probabilities that sum to 4": lambda r: [entry.update(logprob=0.0) for entry in first(r).values()] and None,
}  # fmt: skip


@pytest.mark.parametrize("said", NONSENSE)
def test_nonsense_is_one_clear_line_that_names_the_server(llama, said):
    batch = {"input_ids": torch.tensor([[9, 8, 7, 6, 5, 4], [3, 4, 5, 6, 7, 8]])}

    def edit(reply):
        changed = NONSENSE[said](reply)
        return changed if isinstance(changed, Answer) else None

    with Server(edited(llama, edit)) as server, pytest.raises(ValueError, match=said) as error:
        Remote(server.url, "llama", size=V, k=4).signal(batch, ["logits"])
    assert f"{server.url}/v1/completions answered nonsense" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.requests) == 1  # asking again would not help


# ---- labels -----------------------------------------------------------------------------------------------------


def reviewer(question):
    """Says positive of all reviews with a good word."""
    return "Positive." if any(word in question for word in ("joy", "good", "fine")) else " negative\n"


def test_an_answer_without_log_probabilities_is_a_hard_label():
    batch = {"text": ["a joy", "a bore", "a {text} of fine"], "labels": torch.zeros(3).long()}
    with Server(chat(reviewer)) as server:
        teacher = Remote(server.url, "m", labels=LABELS, prompt=PROMPT)
        logits = teacher.signal(batch, ["logits"])["logits"]
        asked = {request.body["messages"][0]["content"] for request in server.requests}
    never = -math.inf
    assert logits.tolist() == [[never, 0.0], [0.0, never], [never, 0.0]]
    assert asked == {f"Review: {text}\nAnswer with one word." for text in batch["text"]}
    assert all(r.path == "/v1/chat/completions" and r.body["temperature"] == 0.0 for r in server.requests)


def test_hard_labels_are_what_the_losses_take_them_for():
    """Cross-entropy at the label, from the definition, in value and gradient."""
    teacher = torch.tensor([[-math.inf, 0.0], [0.0, -math.inf]])
    scores = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 0]), reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), scores)
    for name in ("hard_label", "forward_kl", "soft_cross_entropy"):
        values = LOSSES.get(name)(scores, teacher.double())
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(torch.autograd.grad(values.sum(), scores)[0], slope)


def test_log_probabilities_of_the_first_token_are_shared_out_to_the_labels():
    """By hand: " Pos" and "positive" begin one label, "Neg" the other, "the" none."""
    p = {" Pos": 0.5, "positive": 0.1, "Neg": 0.2, "the": 0.1}
    tokens = [{text: math.log(value) for text, value in p.items()}, {"itive": 0.0}]
    with Server(chat(lambda _: tokens)) as server:
        teacher = Remote(server.url, "m", labels=LABELS, prompt=PROMPT)
        logits = teacher.signal({"text": ["so"]}, ["logits"])["logits"]
        assert server.requests[0].body["top_logprobs"] == 20
    torch.testing.assert_close(logits, torch.tensor([[0.2 / 0.8, 0.6 / 0.8]]).log())


def listed(*tokens):
    """``logprobs.content`` of an answer; each token is its probabilities by text, the chosen one first."""
    return [
        {
            "token": next(iter(token)),
            "logprob": math.log(next(iter(token.values()))),
            "top_logprobs": [{"token": text, "logprob": math.log(p)} for text, p in token.items()],
        }
        for token in tokens
    ]


def test_labels_that_begin_alike_are_told_apart_by_the_next_token():
    """ "very" is said with 0.8; good and bad follow with 0.75 and 0.25; "fine" was possible with 0.1."""
    tokens = listed({"very": 0.8, "fine": 0.1, "x": 0.1}, {" good": 0.75, " bad": 0.25})
    scores = label_scores(tokens, ["very bad", "very good", "fine"], answer=1)
    assert torch.tensor(scores).exp().tolist() == pytest.approx([0.2 / 0.9, 0.6 / 0.9, 0.1 / 0.9], abs=1e-6)


def test_marks_before_the_label_decide_nothing():
    scores = label_scores(listed({"**": 1.0}, {"pos": 0.9, "neg": 0.1}), LABELS, answer=1)
    assert torch.tensor(scores).exp().tolist() == pytest.approx([0.1, 0.9], abs=1e-6)


def test_a_label_that_is_not_listed_gets_what_is_left_but_no_more_than_the_last():
    left = label_scores(listed({"pos": 0.9, "x": 0.09}), LABELS, answer=1)
    assert math.exp(left[0] - left[1]) == pytest.approx(0.01 / 0.9)
    last = label_scores(listed({"pos": 0.6, "x": 0.05}), LABELS, answer=1)
    assert math.exp(last[0] - last[1]) == pytest.approx(0.05 / 0.6)
    two = label_scores(listed({"a": 0.9, "x": 0.06}), ["a", "b", "c"], answer=0)
    assert [math.exp(score - two[0]) for score in two[1:]] == pytest.approx([0.02 / 0.9] * 2)
    later = label_scores(listed({"*": 0.5, "x": 0.5}, {"pos": 0.9, "x": 0.02}), LABELS, answer=1)
    assert math.exp(later[0] - later[1]) == pytest.approx(0.5 * 0.02 / (0.5 * 0.9))
    full = label_scores(listed({"pos": 1.0}), LABELS, answer=1)
    assert full == [-math.inf, 0.0]


@pytest.mark.parametrize(
    "tokens", [[], listed({"maybe": 1.0}), listed({"neg": 1.0}), listed({"very": 1.0}), listed({"*": 1.0})]
)
def test_tokens_that_do_not_decide_for_the_answer_leave_a_hard_label(tokens):
    assert label_scores(tokens, LABELS, answer=1) is None


@pytest.mark.parametrize(
    ("answer", "number"),
    [("positive", 1), ("**Negative**.", 0), (" POSITIVE\n\nIt is a joy.", 1), ("not positive", None), ("", None)],
)
def test_which_label_an_answer_states(answer, number):
    assert stated(answer, LABELS) == number


def test_an_answer_that_is_no_label_is_an_error_or_no_opinion():
    batch = {"text": ["a joy", "a bore"]}
    with Server(chat(lambda question: "Mixed" if "bore" in question else "positive")) as server:
        with pytest.raises(
            ValueError, match=r"'m' answered 'Mixed' to example 1 .*'negative', 'positive'; ask more"
        ):
            Remote(server.url, "m", labels=LABELS, prompt=PROMPT).signal(batch, ["logits"])
        teacher = Remote(server.url, "m", labels=LABELS, prompt=PROMPT, unknown="uniform", k=0)
        logits = teacher.signal(batch, ["logits"])["logits"]
        assert "top_logprobs" not in server.requests[-1].body
    torch.testing.assert_close(logits[1], torch.full((2,), 0.5).log())
    assert teacher.no_opinion == 1


@pytest.mark.parametrize(
    ("logprobs", "said"),
    [
        ({"content": [{"token": "positive"}]}, "no top_logprobs"),
        ({"content": [{"token": "positive", "logprob": None, "top_logprobs": []}]}, "log-probabilities are"),
        ({"content": [{"token": "positive", "logprob": math.nan, "top_logprobs": []}]}, "log-probability of nan"),
        ({"content": "none"}, "logprobs.content is 'none'"),
        ("none", "logprobs is 'none'"),
    ],
)
def test_nonsense_beside_a_label_is_refused(logprobs, said):
    message = {"index": 0, "message": {"content": "positive"}, "logprobs": logprobs}
    teacher = {"labels": LABELS, "prompt": PROMPT}
    with Server(lambda _: {"choices": [message]}) as server, pytest.raises(ValueError, match=said):
        Remote(server.url, "m", **teacher).signal({"text": ["so"]}, ["logits"])


def test_a_distiller_learns_from_the_answers():
    """The loss is the cross-entropy with the server's labels, whatever the data's own are."""
    batch = {"input": torch.randn(3, 4), "text": ["a joy", "a bore", "fine"], "labels": torch.zeros(3).long()}
    student = torch.nn.Linear(4, 2)
    with Server(chat(reviewer)) as server:
        teacher = Remote(server.url, "m", labels=LABELS, prompt=PROMPT)
        loss = Distiller(student, teacher, [Term("logits", loss="forward_kl")])(**batch).loss
    expected = torch.nn.functional.cross_entropy(student(batch["input"]), torch.tensor([1, 0, 1]))
    torch.testing.assert_close(loss, expected)


def test_texts_come_from_any_entry_that_the_prompt_names():
    batch = {"premise": ["a", "b"], "hypothesis": ["{premise}", "d"]}
    with Server(chat(lambda q: "yes" if q == 'a / {premise} {"json": 1}' else "no")) as server:
        teacher = Remote(server.url, "m", labels=("no", "yes"), prompt='{premise} / {hypothesis} {"json": 1}')
        logits = teacher.signal(batch, ["logits"])["logits"]
        assert logits.argmax(-1).tolist() == [1, 0]
        with pytest.raises(ValueError, match=r"wants 'hypothesis', and the batch has .* only \['premise'\]"):
            teacher.signal({"premise": ["a"]}, ["logits"])


class TestLabels(TeacherContract):
    """Asked by decoded tokens."""

    @pytest.fixture(autouse=True)
    def _server(self):
        with Server(chat(reviewer)) as self.server:
            yield

    def teacher(self):
        return Remote(self.server.url, "m", labels=LABELS, prompt=PROMPT, tokenizer=Words())

    def batch(self):
        return text_batch(5, 4)

    def test_the_answers_differ(self):
        assert set(self.teacher().signal(self.batch(), ["logits"])["logits"].argmax(-1).tolist()) == {0, 1}


def test_padding_is_not_part_of_the_decoded_text():
    with Server(chat(reviewer)) as server:
        teacher = Remote(server.url, "m", labels=LABELS, prompt="{text}", tokenizer=Words())
        batch = {"input_ids": torch.tensor([[5, 5, 1, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
        teacher.signal(batch, ["logits"])
        assert server.requests[0].body["messages"] == [{"role": "user", "content": "this bore"}]


# ---- what it is -------------------------------------------------------------------------------------------------


def test_it_is_a_teacher_that_says_what_it_depends_on():
    teacher = Remote("http://here:1", "llama", size=V, api_key="secret-key")
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, Identified)
    assert json.loads(json.dumps(teacher.identity())) == teacher.identity()  # as it comes back from a file
    assert teacher.identity() == Remote("https://there/v1", "llama", size=V).identity()
    assert "secret-key" not in json.dumps(teacher.identity()) + repr(teacher)


@pytest.mark.parametrize(
    "change",
    [{"k": 5}, {"size": 9}, {"revision": "2"}, {"extra": {"a": 1}}, {"labels": ("no", "yes"), "prompt": "{text}"},
     {"tokenizer": Words()}],
)  # fmt: skip
def test_whatever_changes_the_signals_changes_the_identity(change):
    plain = {"size": V, "k": 7}
    assert Remote("http://h", "m", **plain).identity() != Remote("http://h", "m", **{**plain, **change}).identity()
    assert Remote("http://h", "m", **plain).identity() != Remote("http://h", "n", **plain).identity()


def test_prompt_labels_and_their_order_are_part_of_the_identity():
    kinds = [(("a", "b"), "{text}"), (("b", "a"), "{text}"), (("a", "b"), "{text}?")]
    found = [json.dumps(Remote("http://h", "m", labels=n, prompt=p).identity()) for n, p in kinds]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": LABELS}, "labels and prompt go together"),
        ({"prompt": PROMPT}, "labels and prompt go together"),
        ({"labels": ("a",), "prompt": PROMPT}, "cannot be told apart"),
        ({"labels": ("Yes", "yes!"), "prompt": PROMPT}, "cannot be told apart"),
        ({"labels": ("+", "-"), "prompt": PROMPT}, "cannot be told apart"),
        ({"labels": LABELS, "prompt": "which?"}, "no place for an example"),
        ({"labels": LABELS, "prompt": PROMPT, "unknown": "skip"}, "'skip' is none of"),
        ({"size": 10, "k": 11}, "k=11 log-probabilities .* size=10 has; take k=10"),
        ({"size": 10, "k": 0}, "k is 0; give a number of at least 1"),
        ({"labels": LABELS, "prompt": PROMPT, "k": -1}, "k is -1; give a number of at least 0"),
        ({"size": 30, "batch_size": 0}, "batch_size is 0"),
        ({"size": 0}, "size is 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Remote("http://h", "m", **options)


def test_a_key_beside_a_client_is_refused():
    with pytest.raises(ValueError, match="give it to the Client"):
        Remote(Client("http://h"), "m", api_key="k")


def test_only_logits_are_offered_and_none_by_a_teacher_that_only_writes():
    with pytest.raises(ValueError, match=r"gives logits and not 'hidden_states\.1'"):
        Remote("http://h", "m", size=V).signal(text_batch(), ["logits", "hidden_states.1"])
    with pytest.raises(ValueError, match="gives texts, until size="):
        Remote("http://h", "m").signal(text_batch(), ["logits"])


# ---- failures that pass, and those that do not ------------------------------------------------------------------


def ask(client):
    """The answer to one question."""
    return Remote(client, "m").write(["so?"], max_tokens=4)[0]


@pytest.mark.parametrize("failure", [Answer(None), *(Answer({}, status) for status in (408, 429, 500, 503))])
def test_what_may_pass_is_tried_again(failure):
    clock = Clock()
    with Server(chat(lambda _: "so"), first=[failure, failure]) as server:
        assert ask(quick(server.url, clock)) == "so"
        assert len(server.requests) == 3
    assert len(clock.slept) == 2


def test_a_reply_that_breaks_off_is_asked_for_again():
    cut = Answer(b'{"choices"', headers={"Content-Length": "100"})
    with Server(chat(lambda _: "so"), first=[cut]) as server:
        assert ask(quick(server.url, timeout=0.3)) == "so"


@pytest.mark.parametrize("attempts", [1, 2, 9])
def test_pauses_double_up_to_the_longest_and_are_less_by_a_random_part(attempts):
    clock = Clock()
    with Server(lambda _: Answer({"error": {"message": "warming up"}}, 503)) as server:
        with pytest.raises(ConnectionError, match="status 503: warming up, given up after") as error:
            ask(quick(server.url, clock, attempts=attempts))
        assert len(server.requests) == attempts
    assert len(clock.slept) == attempts - 1
    for number, seconds in enumerate(clock.slept):
        whole = min(30.0, 0.5 * 2**number)
        assert whole / 2 <= seconds <= whole
    times = "1 attempt;" if attempts == 1 else f"{attempts} attempts and {sum(clock.slept):.1f} s of waiting;"
    assert times in str(error.value)
    assert f"{server.url}/v1/chat/completions" in str(error.value)


def test_many_clients_do_not_come_back_at_once():
    waits = set()
    with Server(lambda _: Answer({}, 500)) as server:
        for _ in range(4):
            clock = Clock()
            with pytest.raises(ConnectionError):
                ask(quick(server.url, clock, attempts=2))
            waits.update(clock.slept)
    assert len(waits) == 4


def test_waiting_draws_nothing_from_the_trainings_random_numbers():
    import random

    before = random.getstate(), torch.get_rng_state()
    with Server(chat(lambda _: "so"), first=[Answer({}, 500)]) as server:
        ask(quick(server.url))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_retry_after_is_honoured_in_seconds_and_as_a_date():
    clock = Clock()
    date = email.utils.formatdate(time.time() + 50, usegmt=True)
    first = [Answer({}, 429, {"Retry-After": "7"}), Answer({}, 503, {"Retry-After": date})]
    with Server(chat(lambda _: "so"), first=first) as server:
        ask(quick(server.url, clock))
    assert clock.slept[0] == 7.0
    assert 45 < clock.slept[1] <= 50


def test_a_server_that_asks_for_too_much_patience_is_given_up():
    clock = Clock()
    asks = "asks to wait 3600 s, given up after 1 attempt"
    with (
        Server(lambda _: Answer({}, 429, {"Retry-After": "3600"})) as server,
        pytest.raises(ConnectionError, match=asks),
    ):
        ask(quick(server.url, clock))
    assert clock.slept == []


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_refusal_is_shown_and_not_tried_again(status):
    refusal = {"error": {"message": "max_logprobs is 20\nand you ask for 30", "type": "BadRequestError"}}
    clock = Clock()
    with Server(lambda _: Answer(refusal, status, {"Location": "http://127.0.0.1:9/"})) as server:
        with pytest.raises(ValueError, match=f"status {status}: max_logprobs is 20 and you ask for 30; change"):
            ask(quick(server.url, clock))
        assert len(server.requests) == 1
    assert clock.slept == []


def test_no_answer_in_time_is_tried_again_and_said():
    hold = threading.Event()
    with Server(lambda _: hold.wait(5) and {}) as server:
        with pytest.raises(ConnectionError, match=r"gave no answer within 0\.05 s, given up after 2 attempts"):
            ask(quick(server.url, attempts=2, timeout=0.05))
        hold.set()


def test_a_server_that_is_down_is_one_clear_line():
    clock = Clock()
    with Server(chat(lambda _: "so")) as server:
        pass
    with pytest.raises(ConnectionError) as error:
        ask(quick(server.url, clock, attempts=3))
    assert str(error.value) == (
        f"{server.url}/v1/chat/completions cannot be reached (Connection refused), given up after 3 attempts and "
        f"{sum(clock.slept):.1f} s of waiting; see that the server runs and can be reached from here, then start "
        "again"
    )


def test_after_a_refusal_the_other_requests_are_not_tried_again():
    """One of two is refused while the other waits for its second attempt: without a stop, for 600 s."""
    both = threading.Barrier(2, timeout=10)

    def answer(request):
        both.wait()
        bad = request.body["messages"][0]["content"] == "bad"
        return Answer({}, 400) if bad else Answer({}, 429, {"Retry-After": "600"})

    begun = time.monotonic()
    with Server(answer) as server, pytest.raises(ValueError, match="status 400"):
        Remote(Client(server.url), "m").write(["good", "bad"], max_tokens=4)
    assert time.monotonic() - begun < 10
    assert len(server.requests) == 2


# ---- the key ----------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_may_come_from_a_function():
    keys = iter(["one", "two"])
    with Server(chat(lambda _: "so")) as server:
        ask(Client(server.url, api_key="abc\n"))
        ask(Client(server.url))
        client = Client(server.url, api_key=lambda: next(keys))
        ask(client), ask(client)
        sent = [request.headers.get("Authorization") for request in server.requests]
    assert sent == ["Bearer abc", None, "Bearer one", "Bearer two"]


@pytest.mark.parametrize("status", [200, 401, 503])
def test_no_message_shows_the_key_even_if_the_server_repeats_it(status):
    with (
        Server(lambda r: Answer(f"what is {r.headers['Authorization']}?".encode(), status)) as server,
        pytest.raises((ValueError, ConnectionError), match=r"what is Bearer \*\*\*") as error,
    ):
        ask(quick(server.url, api_key="sk-12345", attempts=1))
    assert "sk-12345" not in str(error.value)


@pytest.mark.parametrize("key", ["a\nsecret", "sécret"])
def test_a_key_that_cannot_be_sent_is_not_shown(key):
    with pytest.raises(ValueError, match="the api_key holds line breaks") as error:
        ask(quick("http://127.0.0.1:9", api_key=key))
    assert "cret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@host",
        "http://host/?key=hunter2",
        "ftp://host",
        "host:8000",
        "http://",
        "http://a b",
        "http://host:port",
        "http://[::1",
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url):
    with pytest.raises(ValueError, match="http://host:port") as error:
        Client(url)
    assert "hunter2" not in str(error.value)


def test_the_address_may_have_a_path_and_is_https_where_it_says_so():
    assert Client("https://host/openai/v1").address == "https://host:443/openai"
    assert Client("http://host").address == "http://host:80"


@pytest.mark.parametrize("options", [{"attempts": 0}, {"workers": 0}, {"timeout": 0.0}, {"timeout": math.nan}])
def test_settings_that_allow_nothing_are_refused(options):
    with pytest.raises(ValueError, match="must all be positive"):
        Client("http://host", **options)


# ---- again, from where it stopped -------------------------------------------------------------------------------


def asked_prompts(server):
    return [request.body["messages"][0]["content"] for request in server.requests]


def test_written_answers_are_in_order_and_each_prompt_is_asked_once(tmp_path):
    with Server(chat(str.upper)) as server:
        teacher = Remote(server.url, "m")
        assert teacher.write(["a", "b", "a", "c"], max_tokens=9, folder=tmp_path) == ["A", "B", "A", "C"]
        assert sorted(asked_prompts(server)) == ["a", "b", "c"]
        assert teacher.write(["d", "c", "a"], max_tokens=9, folder=tmp_path) == ["D", "C", "A"]
        assert asked_prompts(server)[3:] == ["d"]
        assert teacher.write([], max_tokens=9) == []
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert {(line["prompt"], line["answer"], line["finish_reason"]) for line in lines} == {
        (text, text.upper(), "stop") for text in "abcd"
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [({"max_tokens": 8}, {"max_tokens": 9}), ({"temperature": 0.0}, {"temperature": 1.0})],
)
def test_other_settings_are_asked_anew(tmp_path, first, second):
    settings = {"max_tokens": 8, "folder": tmp_path}
    with Server(chat(str.upper)) as server:
        for change in (first, second, first):
            Remote(server.url, "m").write(["a"], **{**settings, **change})
        assert len(server.requests) == 2
        Remote(server.url, "m", revision="2").write(["a"], **{**settings, **first})
        Remote(server.url, "n").write(["a"], **{**settings, **first})
        assert len(server.requests) == 4


def test_a_server_that_dies_loses_no_answer(tmp_path):
    """After five of ten prompts, the server answers no more; the next call asks for the others alone."""
    prompts = [f"q{n}" for n in range(10)]
    count = iter(range(100))
    upper = chat(str.upper)
    with Server(lambda request: upper(request) if next(count) < 5 else Answer({}, 503)) as server:
        with pytest.raises(ConnectionError, match="status 503"):
            Remote(quick(server.url, workers=3), "m").write(prompts, max_tokens=4, folder=tmp_path)
        answered = len(Answers(tmp_path).found)
    assert answered == 5
    with Server(upper) as server:
        found = Remote(quick(server.url), "m").write(prompts, max_tokens=4, folder=tmp_path)
        assert len(server.requests) == 5
    assert found == [prompt.upper() for prompt in prompts]


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_line_that_a_crash_left_unfinished_is_written_anew(tmp_path, cut):
    for name in ("one", "two"):
        Answers(tmp_path).keep(name, f"answer {name} ü\n", {"prompt": name})
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-cut])
    again = Answers(tmp_path)
    kept_two = cut == 1  # the line's end alone was missing
    assert set(again.found) == ({"one", "two"} if kept_two else {"one"})
    again.keep("three", "3", {})
    assert Answers(tmp_path).found == again.found
    assert again.found["one"] == "answer one ü\n"


def test_nonsense_in_place_of_a_text_is_refused():
    null = {"choices": [{"index": 0, "message": {"content": None}}]}
    with Server(lambda _: null) as server, pytest.raises(ValueError, match=r"message\.content is 'None'"):
        ask(quick(server.url))


def test_a_cached_teacher_goes_on_where_its_server_died(tmp_path):
    batches = [text_batch(3, 4, seed=seed) for seed in range(4)]

    def cached(url):
        teacher = Remote(quick(url, attempts=2), "m", labels=LABELS, prompt=PROMPT, tokenizer=Words())
        return Cached(teacher, Store(teacher.identity(), tmp_path / "kept", shard_bytes=1))

    with Server(chat(reviewer)) as server:
        before = [cached(server.url).signal(batch, ["logits"])["logits"] for batch in batches[:2]]
        assert len(server.requests) == 6
    with pytest.raises(ConnectionError, match="Connection refused"):
        cached(server.url).signal(batches[2], ["logits"])
    with Server(chat(reviewer)) as server:
        teacher = cached(server.url)
        after = [teacher.signal(batch, ["logits"])["logits"] for batch in batches]
        assert len(server.requests) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))


def test_the_blocks_of_the_document_run(llama):
    text = (Path(__file__).parent.parent / "docs" / "remote.md").read_text()
    complete, answer = vllm(llama), chat(reviewer)
    with Server(lambda request: (answer if "chat" in request.path else complete)(request)) as server:
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        names = {}
        for block in blocks:
            exec(compile(block.replace("http://teacher:8000", server.url), "remote.md", "exec"), names)
        assert len(blocks) == 4
        assert len(server.requests) == 1 + 2 + 2


@pytest.mark.parametrize("labels", ["ab", [1, 2], 3])
def test_labels_that_are_no_list_of_texts_are_refused(labels):
    with pytest.raises(TypeError, match="is no list of texts; name each class"):
        Remote("http://h", "m", labels=labels, prompt=PROMPT)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("abc", {}, TypeError, "the prompts are one text, 'abc'; pass a list"),
        (["a"], {"max_tokens": 0}, ValueError, "max_tokens is 0; give a number"),
        (["a"], {"temperature": -1}, ValueError, "the temperature is -1; give a number from 0"),
    ],
)
def test_wrong_orders_to_write_are_refused_before_the_server_is_asked(prompts, options, error, message):
    with pytest.raises(error, match=message):
        Remote("http://h", "m").write(prompts, **{"max_tokens": 4, **options})


def test_answers_are_not_kept_among_other_things(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for folder, message in (
        (tmp_path, "holds 'thesis.txt' and no answers"),
        (tmp_path / "thesis.txt", "is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            Remote("http://h", "m").write(["a"], max_tokens=4, folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
