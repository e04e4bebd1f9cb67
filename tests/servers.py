"""Servers for tests, in threads of the test's own process and on 127.0.0.1 alone."""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


@dataclass
class Answer:
    """What a server says to one request. A body of bytes is sent as it is, others as JSON; None breaks off."""

    body: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)


@dataclass
class Request:
    path: str
    headers: dict
    body: dict


class Server:
    """Answers each POST with what a function says.

    Args:
        answer: Is given a Request; returns an Answer, or an object to send as JSON.
        first: Answers to the first requests, before the function is asked.
    """

    def __init__(self, answer, first=()):
        self.answer, self.first = answer, list(first)
        self.requests = []
        self._lock = threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer._handle(self)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Be down: connections are refused from now on."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handle(self, handler):
        sent = handler.rfile.read(int(handler.headers["Content-Length"]))
        request = Request(handler.path, dict(handler.headers), json.loads(sent))
        with self._lock:
            self.requests.append(request)
            said = self.first.pop(0) if self.first else None
        said = self.answer(request) if said is None else said
        said = said if isinstance(said, Answer) else Answer(said)
        if said.body is None:
            return handler.connection.close()
        body = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
        handler.send_response(said.status)
        for name, value in {"Content-Length": str(len(body)), **said.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
        return None


def vllm(model):
    """What vLLM answers to /v1/completions with prompt_logprobs, for a model of transformers in this process."""

    def answer(request):
        return {"object": "text_completion", "choices": _choices(model, request.body)}

    return answer


def _choices(model, body):
    found = []
    for index, prompt in enumerate(body["prompt"]):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0]
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        rows = [_row(log_probs[i], body["prompt_logprobs"], own) for i, own in enumerate(prompt[1:])]
        last = _row(log_probs[-1], body["logprobs"], own=prompt[0])  # "sampled": any token, also beyond the k
        top = {f"token_id:{token}": entry["logprob"] for token, entry in last.items()}
        found.append(
            {
                "index": index,
                "text": "x",
                "finish_reason": "length",
                "prompt_logprobs": [None, *rows],
                "logprobs": {"tokens": ["token_id:0"], "top_logprobs": [top]},
            }
        )
    return found[::-1]  # the order is not promised, the index is


def _row(log_probs, k, own):
    """The own token first, then the k most probable, as vLLM orders them."""
    order = log_probs.argsort(descending=True).tolist()
    tokens = dict.fromkeys([own, *order[:k]])
    return {
        str(token): {
            "logprob": max(log_probs[token].item(), -9999.0),
            "rank": order.index(token) + 1,
            "decoded_token": f"<{token}>",
        }
        for token in tokens
    }


def chat(say):
    """A chat server that answers a question with the text, or the tokens, that a function gives.

    Args:
        say: Is given the user's message; returns a text, or the answer's tokens, each a dict of log-probabilities
            by token of which the first is the one that was chosen.
    """

    def answer(request):
        said = say(request.body["messages"][-1]["content"])
        text = said if isinstance(said, str) else "".join(next(iter(token)) for token in said)
        listed = None if isinstance(said, str) else {"content": [_listed(token) for token in said]}
        listed = listed if request.body.get("logprobs") else None
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": listed}
        return {"object": "chat.completion", "choices": [{**choice, "finish_reason": "stop"}]}

    return answer


def _listed(token):
    entries = [{"token": text, "logprob": value} for text, value in token.items()]
    return {**entries[0], "top_logprobs": sorted(entries, key=lambda entry: -entry["logprob"])}
