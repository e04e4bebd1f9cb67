"""The last metre: an exported model answers, with onnxruntime and tokenizers, without PyTorch or limbeck.

    python examples/serve_onnx.py EXPORT "a text" ["another text"]       pairs of texts: "one ||| two"

EXPORT is the folder that ``limbeck export`` wrote. For each text: the label and its probability, or the predicted
number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

PAIR = "|||"


class Classifier:
    """A text model as it was exported: texts in, logits out.

    Args:
        folder: Where ``limbeck export`` wrote it.
        threads: Threads of one call.
    """

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        folder = Path(folder)
        self.about = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.about["max_tokens"])
        padding = self.about["padding"]
        self.tokenizer.enable_padding(pad_id=padding["id"], pad_token=padding["token"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = str(folder / self.about["file"])
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def logits(self, texts: list[str | tuple[str, str]]) -> np.ndarray:
        """One row of logits for each text or pair of texts."""
        encoded = self.tokenizer.encode_batch(texts)
        known = {
            "input_ids": [each.ids for each in encoded],
            "attention_mask": [each.attention_mask for each in encoded],
            "token_type_ids": [each.type_ids for each in encoded],
        }
        fed = {name: np.array(known[name], dtype=np.int64) for name in self.about["inputs"]}
        return self.session.run(["logits"], fed)[0]

    def answers(self, texts: list[str | tuple[str, str]]) -> list[tuple[str, float]]:
        """For each text its label and how probable it is; without labels, the number."""
        logits, labels = self.logits(texts), self.about["labels"]
        if logits.shape[1] == 1:
            return [("score", float(row[0])) for row in logits]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [(labels[row.argmax()] if labels else str(row.argmax()), float(row.max())) for row in shares]


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    texts = [tuple(map(str.strip, t.split(PAIR, 1))) if PAIR in t else t for t in sys.argv[2:]]
    for text, (label, value) in zip(sys.argv[2:], Classifier(sys.argv[1]).answers(texts), strict=True):
        print(f"{label}\t{value:.3f}\t{text}")


if __name__ == "__main__":
    main()
