"""What a teacher said, kept by the content of its examples: it runs once."""

from limbeck.cache.keys import example_keys, first_difference, json_digest, module_identity, weights_digest
from limbeck.cache.layout import KINDS, Kind, cut, join, kind_of
from limbeck.cache.store import MANIFEST, Store, merge, prune, read_manifest, verify

__all__ = [
    "KINDS",
    "MANIFEST",
    "Kind",
    "Store",
    "cut",
    "example_keys",
    "first_difference",
    "join",
    "json_digest",
    "kind_of",
    "merge",
    "module_identity",
    "prune",
    "read_manifest",
    "verify",
    "weights_digest",
]
