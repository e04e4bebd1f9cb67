"""A teacher behind a server: OpenAI-compatible, or vLLM where log-probabilities of a text's own tokens are wanted.

Shape legend: B examples, L positions, K known entries, V entries of the vocabulary, C labels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.batch import ATTENTION_MASK, device_of, is_texts
from limbeck.cache.keys import json_digest
from limbeck.teachers.answers import Answers
from limbeck.teachers.client import Client, Key
from limbeck.teachers.replies import choices, field, label_scores, log_rest, plain, prompt_entries, stated
from limbeck.types import Batch, Signal, TopK

LOGITS, TEXT, INPUT_IDS = "logits", "text", "input_ids"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FIELD = re.compile(r"\{(\w+)\}")
ANSWER_TOKENS = 16
PLAIN_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said to vLLM in full, since it takes what is not said from the model's own ``generation_config.json``."""


class Remote:
    """A teacher on a server.

    It speaks in one of two ways, or only writes (see `write`):

    - with `size` or `tokenizer`, of every token of ``input_ids``: logits (B, L, V) as `TopK` at temperature 1,
      from the ``prompt_logprobs`` of a vLLM server whose model has the batch's tokenizer;
    - with `labels` and `prompt`, of each example as a whole: a chat asks which of the labels is right, and the
      logits (B, C) are log-probabilities of the labels if the server lists those of the answer's tokens, and else
      0 for the label that it answers and minus infinity for the others.

    Args:
        url: The server's address; or a `Client`, to set time-outs, attempts and requests at once.
        model: The model's name on the server.
        size: V, that of the model's logits; of the tokenizer if not given.
        tokenizer: Of the batch's ``input_ids``, as of transformers.
        k: K, how many log-probabilities to ask for: 20 is what vLLM gives unless started with a larger
            ``--max-logprobs``, and the most of OpenAI. 0 with `labels`: none, the answer alone.
        labels: The classes' names, in the order of the data's class numbers.
        prompt: The question; ``{text}`` stands for the batch's texts of that name, or for the decoded
            ``input_ids`` where it has none.
        unknown: What to do with an answer that is no label: an ``"error"``, or the same logit for all labels
            (``"uniform"``), counted in `no_opinion`.
        revision: Which state of the model it is, in words of your own: part of `identity`, since a server does not
            say.
        extra: Further fields of the requests, such as ``{"chat_template_kwargs": {"enable_thinking": False}}``;
            None takes a field out.
        api_key: For the server; see `Client`.
        batch_size: Prompts in one request of tokens.

    Attributes:
        no_opinion: How many answers were no label so far.

    Raises:
        TypeError: labels that are no list of texts.
        ValueError: options that do not go together.

    Example:
        >>> question = "Is this review bad or good? {text}"
        >>> teacher = Remote("http://127.0.0.1:8000", "llama", labels=("bad", "good"), prompt=question)
        >>> teacher.offers("logits"), teacher.offers("hidden_states.1"), teacher.identity()["remote"]
        (True, False, 'llama')
    """

    def __init__(
        self,
        url: str | Client,
        model: str,
        *,
        size: int | None = None,
        tokenizer: Any = None,
        k: int = 20,
        labels: Sequence[str] | None = None,
        prompt: str | None = None,
        unknown: Literal["error", "uniform"] = "error",
        revision: str = "",
        extra: Mapping[str, Any] | None = None,
        api_key: Key = None,
        batch_size: int = 8,
    ) -> None:
        if isinstance(url, Client) and api_key is not None:
            raise ValueError("the api_key was given beside a Client; give it to the Client")
        self.client = url if isinstance(url, Client) else Client(url, api_key=api_key)
        self.model = model
        self.size = len(tokenizer) if size is None and tokenizer is not None else size
        self.tokenizer = tokenizer
        self.k = k
        self.labels = None if labels is None else _labels(labels)
        self.prompt = prompt
        self.unknown = unknown
        self.revision = revision
        self.extra = dict(extra or {})
        self.batch_size = batch_size
        self.no_opinion = 0
        self._check()

    def _check(self) -> None:
        for name, least in (("size", 1), ("batch_size", 1), ("k", 1 if self.size and not self.labels else 0)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise ValueError(f"{name} is {number}; give a number of at least {least}")
        if (self.labels is None) != (self.prompt is None):
            raise ValueError("labels and prompt go together, and one of them is missing; give both or neither")
        if self.unknown not in ("error", "uniform"):
            raise ValueError(f"unknown={self.unknown!r} is none of 'error' and 'uniform'; choose one of them")
        if self.labels is not None:
            _check_labels(self.labels, self.prompt or "")
        if self.size is not None and not self.labels and self.k > self.size:
            raise ValueError(
                f"k={self.k} log-probabilities are more than the vocabulary of size={self.size} has; take "
                f"k={self.size} or less"
            )

    def offers(self, tap: str) -> bool:
        """Whether it is ``logits``: a server gives nothing else."""
        return tap in self.names()

    def names(self) -> Iterable[str]:
        """``logits``, unless the teacher only writes."""
        return (LOGITS,) if self.labels or self.size else ()

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Ask the server about a batch.

        Args:
            batch: ``input_ids`` (B, L) with an ``attention_mask`` (B, L) where some are padding, on either side;
                or texts by the names that stand in `prompt`.
            wants: ``["logits"]``.

        Returns:
            The logits: a `TopK` of shape (B, L, V), in which positions of padding hold the uniform distribution;
            or (B, C), float32.

        Raises:
            ValueError: another tap is wanted, the batch lacks what is needed, the server refuses or answers
                nonsense, or an answer is no label.
            ConnectionError: the server cannot be reached, or not be made to answer.
        """
        wrong = next((tap for tap in wants if not self.offers(tap)), None)
        if wrong is not None:
            given = "logits" if self.offers(LOGITS) else "texts, until size=, tokenizer= or labels= is given,"
            raise ValueError(
                f"{self.model!r} on a server gives {given} and not {wrong!r}; take a tap that it gives"
            )
        if not wants:
            return Signal({})
        return Signal({LOGITS: self._label_logits(batch) if self.labels else self._token_logits(batch)})

    def identity(self) -> Mapping[str, Any]:
        """What determines the signals: model, revision and question, but not where the server is.

        A server may move, and serve the same model elsewhere. It does not prove which weights it has: whoever
        changes them under the same name says so by `revision`.
        """
        tokenizer = None if self.tokenizer is None else json_digest(self.tokenizer.get_vocab())
        return {
            "remote": self.model,
            "revision": self.revision,
            "k": self.k,
            "size": self.size,
            "tokenizer": tokenizer,
            "labels": None if self.labels is None else json.dumps(self.labels),
            "prompt": self.prompt,
            "unknown": self.unknown,
            "extra": json.dumps(self.extra, sort_keys=True),
        }

    def write(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        folder: str | Path | None = None,
    ) -> list[str]:
        """Let the teacher answer prompts: data for sequence-level distillation.

        Args:
            prompts: Each is the user's message of a chat of its own. The same prompt is asked once.
            max_tokens: The most that an answer may have.
            temperature: At which to sample; 0 takes the most probable token each time.
            folder: Where to keep each answer as soon as it is there, found again by prompt, model, revision and
                settings: after an interruption, only what is missing is asked for.

        Returns:
            The answers, in the order of the prompts.

        Raises:
            TypeError: the prompts are one text.
            ValueError: the server refuses, or answers nonsense; no token, a temperature below 0, or a folder that
                holds other things.
            ConnectionError: the server cannot be reached, or not be made to answer.

        Reference:
            Kim and Rush 2016, Sequence-Level Knowledge Distillation, arXiv:1606.07947.
        """
        if isinstance(prompts, str):
            raise TypeError(f"the prompts are one text, {prompts[:60]!r}; pass a list of them")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; give a number of at least 1")
        if not 0 <= temperature < math.inf:
            raise ValueError(
                f"the temperature is {temperature}; give a number from 0, which always takes the best"
            )
        kept = Answers(None if folder is None else Path(folder))
        bodies = [self._chat(prompt, max_tokens, temperature=temperature) for prompt in prompts]
        keys = [json_digest({"revision": self.revision, **body}) for body in bodies]
        missing = {key: place for place, key in enumerate(keys) if key not in kept.found}

        def keep(number: int, reply: Mapping[str, Any]) -> None:
            choice = choices(reply, 1)[0]
            answer = field(choice, "message", "content", kind=str)
            about = {"prompt": prompts[places[number]], "finish_reason": choice.get("finish_reason")}
            kept.keep(keys[places[number]], answer, about)

        places = list(missing.values())
        self.client.post_all(CHAT, [bodies[place] for place in places], keep)
        return [kept.found[key] for key in keys]

    def _body(self, **fields: Any) -> dict[str, Any]:
        body = {"model": self.model, **fields, **self.extra}
        return {name: value for name, value in body.items() if value is not None}

    def _chat(self, question: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        return self._body(messages=messages, max_tokens=max_tokens, **fields)

    # ---- of each example ------------------------------------------------------------------------------------

    def _label_logits(self, batch: Batch) -> Tensor:
        """(B, C)."""
        listing = {"logprobs": True, "top_logprobs": self.k} if self.k else {}
        bodies = [
            self._chat(question, ANSWER_TOKENS, temperature=0.0, **listing) for question in self._questions(batch)
        ]
        rows = self.client.post_all(CHAT, bodies, self._opinion)
        self.no_opinion += sum(row is None for row in rows)
        assert self.labels is not None
        none = [-math.log(len(self.labels))] * len(self.labels)
        return torch.tensor([none if row is None else row for row in rows]).to(
            device_of(batch) or torch.device("cpu")
        )

    def _opinion(self, place: int, reply: Mapping[str, Any]) -> list[float] | None:
        """Log-probabilities of the labels, None where the answer is no label."""
        assert self.labels is not None
        choice = choices(reply, 1)[0]
        answer = field(choice, "message", kind=dict).get("content") or ""
        number = stated(str(answer), self.labels)
        if number is None:
            if self.unknown == "uniform":
                return None
            raise ValueError(
                f"{self.model!r} answered {str(answer)[:60]!r} to example {place} of the batch, which is none of "
                f"the labels {', '.join(map(repr, self.labels))}; ask more clearly, or choose unknown='uniform'"
            )
        alone = [0.0 if n == number else -math.inf for n in range(len(self.labels))]
        listed = _listed(choice) if self.k else []
        return label_scores(listed, self.labels, number) or alone

    def _questions(self, batch: Batch) -> list[str]:
        assert self.prompt is not None
        prompt = self.prompt
        texts = {name: self._texts(batch, name) for name in FIELD.findall(prompt)}
        return [
            FIELD.sub(partial(_filled, dict(zip(texts, row, strict=True))), prompt)
            for row in zip(*texts.values(), strict=True)
        ]

    def _texts(self, batch: Batch, name: str) -> list[str]:
        """The batch's texts of a name, or those that its tokens stand for."""
        if is_texts(batch.get(name)):
            return list(batch[name])
        if name != TEXT or self.tokenizer is None or INPUT_IDS not in batch:
            raise ValueError(
                f"the prompt wants {name!r}, and the batch has no texts of that name, only {sorted(batch)}; add a "
                "list of texts, or, for 'text' from input_ids, give tokenizer="
            )
        tokens, spans = _spans(batch)
        return [
            self.tokenizer.decode(row[a:b], skip_special_tokens=True)
            for row, (a, b) in zip(tokens, spans, strict=True)
        ]

    # ---- of each token --------------------------------------------------------------------------------------

    def _token_logits(self, batch: Batch) -> TopK:
        """(B, L, V)."""
        tokens, spans = _spans(batch)
        told = [row for row, (a, b) in enumerate(spans) if b > a]
        parts = [told[at : at + self.batch_size] for at in range(0, len(told), self.batch_size)]
        prompts = [[tokens[row][slice(*spans[row])] for row in part] for part in parts]
        replies = self.client.post_all(
            COMPLETIONS,
            [self._completion(p) for p in prompts],
            lambda place, reply: self._read(prompts[place], reply),
        )
        found = self._uniform(len(tokens), batch[INPUT_IDS].shape[1])
        for part, entries in zip(parts, replies, strict=True):
            for row, (ids, values) in zip(part, entries, strict=True):
                here = slice(*spans[row])
                found.ids[row, here] = ids
                found.values[row, here] = values.float()
                found.log_rest[row, here, 0] = log_rest(values, found.size).float()
        return found.to(device_of(batch) or torch.device("cpu"))

    def _completion(self, prompts: list[list[int]]) -> dict[str, Any]:
        return self._body(
            prompt=prompts,
            max_tokens=1,  # its distribution is the one after the last token
            prompt_logprobs=self.k,
            logprobs=self.k,
            return_tokens_as_token_ids=True,
            **PLAIN_SAMPLING,
        )

    def _read(self, prompts: list[list[int]], reply: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        assert self.size is not None
        found = choices(reply, len(prompts))
        return [prompt_entries(c, p, self.k, self.size) for c, p in zip(found, prompts, strict=True)]

    def _uniform(self, rows: int, length: int) -> TopK:
        """A distribution that says nothing, everywhere."""
        assert self.size is not None
        share, others = -math.log(self.size), self.size - self.k
        rest = math.log(others) + share if others else -math.inf
        ids = torch.arange(self.k).expand(rows, length, self.k).clone()
        return TopK(ids, self.size, (1.0,), torch.full(ids.shape, share), torch.full((rows, length, 1), rest))


def _labels(given: Any) -> tuple[str, ...]:
    is_list = isinstance(given, Iterable) and not isinstance(given, str)
    found = tuple(given) if is_list else ()
    if not is_list or not all(isinstance(label, str) for label in found):
        raise TypeError(f"labels={given!r} is no list of texts; name each class, such as ('bad', 'good')")
    return found


def _check_labels(labels: Sequence[str], prompt: str) -> None:
    bare = [plain(label) for label in labels]
    if len(labels) < 2 or "" in bare or len(set(bare)) < len(bare):
        raise ValueError(
            f"the labels {', '.join(map(repr, labels))} cannot be told apart in an answer; give two or more that "
            "differ in letters or digits"
        )
    if not FIELD.search(prompt):
        raise ValueError(f"the prompt {prompt[:60]!r} has no place for an example; write {{text}} where it goes")


def _listed(choice: Any) -> list[Any]:
    """The tokens of a chat's answer with their log-probabilities; none where the server gives none, as many do."""
    if not choice.get("logprobs") or field(choice, "logprobs", kind=dict).get("content") is None:
        return []
    tokens: list[Any] = field(choice, "logprobs", "content", kind=list)
    return tokens


def _filled(texts: Mapping[str, str], place: re.Match[str]) -> str:
    return texts[place[1]]


def _spans(batch: Batch) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The token ids of each example, and where its tokens begin and end.

    Raises:
        ValueError: there are none, the mask has another shape, or there is padding between tokens.
    """
    ids, mask = batch.get(INPUT_IDS), batch.get(ATTENTION_MASK)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"a server is sent input_ids (B, L), and the batch has {sorted(batch)}; add them")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"the attention_mask has the shape {tuple(mask.shape)} and input_ids have {tuple(ids.shape)}; make "
            "them equal"
        )
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    counts, firsts = valid.sum(dim=1), valid.int().argmax(dim=1)
    place = torch.arange(ids.shape[1], device=ids.device)
    filled = (place >= firsts[:, None]) & (place < (firsts + counts)[:, None])
    holes = (filled != valid).any(dim=1).nonzero()
    if len(holes):
        raise ValueError(
            f"example {int(holes[0])} has padding between its tokens, which a server cannot be told of; pad on "
            "one side alone"
        )
    return ids.tolist(), list(zip(firsts.tolist(), (firsts + counts).tolist(), strict=True))
