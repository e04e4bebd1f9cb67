"""Stores with a few examples in them, for several test files; loads nothing heavy."""

import numpy as np
import torch

from limbeck.cache import Dense, Store, describe, kept_by
from limbeck.cache.layout import Column
from limbeck.cache.shards import Tap

BELONGS = {"teacher": "a", "dtype": "fp32"}


def keys(count, start=0):
    return [bytes([start + i]) * 12 for i in range(count)]


def filled(folder=None, count=6, start=0, **options):
    store = Store(BELONGS, folder, **options)
    put(store, count, start)
    return store


def put(store, count=6, start=0):
    """Examples of 1, 2, 3, ... positions."""
    logits = torch.arange(start, start + count).float()[:, None].repeat(1, 3)
    hidden = torch.cat([torch.arange(2.0 * (1 + i)).view(1 + i, 2) for i in range(count)])
    attention = torch.cat([torch.arange(4.0 * (1 + i) ** 2).view((1 + i) ** 2, 4) for i in range(count)])
    parts = {
        "logits": Column("row", logits),
        "hidden": Column("tokens", hidden, np.arange(1, count + 1)),
        "attention": Column("pairs", attention, np.arange(1, count + 1)),
    }
    form = describe(Dense())
    store.put(keys(count, start), {tap: Tap(c.kind, form, {"": c}) for tap, c in parts.items()})


def put_rows(store, count=2, **values):
    taps = {tap: kept_by(Dense("fp32"), torch.stack(rows), None, []) for tap, rows in values.items()}
    store.put(keys(count), taps)


def content(store, count=6, start=0):
    return [store.get(key, tap) for key in keys(count, start) for tap in ("logits", "hidden", "attention")]


def same(ours, theirs):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(ours, theirs, strict=True))
