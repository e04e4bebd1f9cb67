"""What a teacher said, kept by the content of its examples: it runs once."""

from limbeck.cache.folder import MANIFEST, WORK, merge, prune, read_manifest, verify
from limbeck.cache.forms import Dense, Form, HybridForm, SampledForm, TopKForm, describe, kept_by
from limbeck.cache.keys import (
    example_keys,
    first_difference,
    json_digest,
    module_identity,
    tensors_digest,
    weights_digest,
)
from limbeck.cache.layout import KINDS, Kind, kind_of
from limbeck.cache.store import Store

__all__ = [
    "KINDS",
    "MANIFEST",
    "WORK",
    "Dense",
    "Form",
    "HybridForm",
    "Kind",
    "SampledForm",
    "Store",
    "TopKForm",
    "describe",
    "example_keys",
    "first_difference",
    "json_digest",
    "kept_by",
    "kind_of",
    "merge",
    "module_identity",
    "prune",
    "read_manifest",
    "tensors_digest",
    "verify",
    "weights_digest",
]
