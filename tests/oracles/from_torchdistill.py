"""torchdistill's losses; they read dictionaries of module paths."""

from functools import cache
from types import SimpleNamespace

import torch

from limbeck.losses.contrastive import noise_contrast
from tests.golden_cases import generate
from tests.oracles.pairs import labels_for, ours, pair

NAME = "torchdistill"
PLACE = (".", "output", ".", "output")
ONE_PAIR = {"pair": {"student": {"path": ".", "io": "output"}, "teacher": {"path": ".", "io": "output"}}}
TWO_PLACES = {
    "pair": {
        f"{side}_{place}": {"path": place, "io": "output"}
        for side in ("student", "teacher")
        for place in ("first", "second")
    }
}


def io(tensor):
    return {".": {"output": tensor}}


def theirs(name, *arguments, **options):
    """A loss of torchdistill as a function of two tensors."""
    from torchdistill.losses import mid_level

    criterion = getattr(mid_level, name)(*arguments, **options)
    return lambda student, teacher: criterion(io(student), io(teacher))


@pair("forward_kl", NAME, "logits")
def kd_loss():
    from torchdistill.losses.mid_level import KDLoss

    criterion = KDLoss(*PLACE, temperature=4.0, alpha=1e-300, beta=1.0)
    return ours("forward_kl", temperature=4.0), lambda s, t: criterion(io(s), io(t), labels_for(s))


@pair("forward_kl", NAME, "logits", deviates="without labels or with alpha 0, KDLoss drops T² and beta silently")
def kd_loss_without_labels():
    return ours("forward_kl", temperature=4.0), theirs("KDLoss", *PLACE, temperature=4.0, alpha=0.0, beta=0.5)


@pair("forward_kl", NAME, "logits", tolerance=1e-7)
def standardized_logits():
    """Two standardised logits are always the same two numbers: their gradient is rounding, divided by little."""
    from torchdistill.losses.mid_level import LogitStdKDLoss

    criterion = LogitStdKDLoss(*PLACE, temperature=2.0, alpha=1e-300, beta=9.0)
    mine = ours("forward_kl", temperature=2.0, transforms="standardize")
    return lambda s, t: 9 * mine(s, t), lambda s, t: criterion(io(s), io(t), labels_for(s))


@pair("dist", NAME, "logits", tolerance=2e-6)
def dist():
    return ours("dist"), theirs("DISTLoss", *PLACE)


@pair("dist", NAME, "logits", tolerance=2e-6)
def dist_warm():
    options = {"beta": 0.5, "gamma": 2.0}
    return ours("dist", temperature=4.0, **options), theirs("DISTLoss", *PLACE, tau=4.0, **options)


@pair("dist", NAME, "maps", deviates="DIST+ adds the correlation of channels where it means one minus it")
def dist_plus():
    from torchdistill.losses.mid_level import DISTPlusLoss

    criterion = DISTPlusLoss(*[part for _ in range(4) for part in (".", "output")])
    return lambda s, t: (s - s).sum(), lambda s, t: criterion.channel_relation(s, s)  # equal maps cost nothing


@pair("attention_transfer", NAME, "maps")
def attention_of_the_code():
    return ours("attention_transfer"), theirs("ATLoss", ONE_PAIR, mode="code")


@pair("attention_transfer", NAME, "maps")
def attention_of_the_paper():
    return ours("attention_transfer", mode="paper"), theirs("ATLoss", ONE_PAIR, mode="paper")


def two_places(stacked):
    """A map, and another of half its height and width."""
    first, second = stacked
    return first, second[:, :, : first.shape[2] // 2, : first.shape[3] // 2].contiguous()


@pair("fsp", NAME, "map pairs")
def fsp():
    from torchdistill.losses.mid_level import FSPLoss

    criterion = FSPLoss(TWO_PLACES)
    mine = ours("fsp", distance="columns", pool="max")

    def both(stacked):
        return {name: {"output": x} for name, x in zip(("first", "second"), two_places(stacked), strict=True)}

    return lambda s, t: mine(two_places(s), two_places(t)), lambda s, t: criterion(both(s), both(t))


@pair("fsp", NAME, "map pairs", deviates="FSPLoss sums the lengths of columns, the paper squares")
def fsp_of_the_paper():
    mine = ours("fsp", pool="max")
    return lambda s, t: mine(two_places(s), two_places(t)), fsp()[1]


@pair("ab", NAME, "maps")
def activation_boundaries():
    return ours("ab", margin=1.0), theirs("AltActTransferLoss", ONE_PAIR, margin=1.0, reduction="mean")


def factor(p):
    from torchdistill.losses.mid_level import FTLoss

    criterion = FTLoss(p=p, paraphraser_path=".", translator_path=".")
    return ours("factor_transfer", p=p), lambda s, t: criterion(io(s), io(t))


@pair("factor_transfer", NAME, "maps")
def factor_of_the_one_norm():
    return factor(1)


@pair("factor_transfer", NAME, "maps")
def factor_of_the_two_norm():
    return factor(2)


@pair("channel_similarity", NAME, "maps")
def channel_similarity():
    mine = ours("channel_similarity")  # theirs divides by the batch size twice
    return lambda s, t: mine(s, t) / len(s), theirs("ChSimLoss", ONE_PAIR)


@pair("vid", NAME, "maps")
def vid():
    from torchdistill.losses.mid_level import VIDLoss

    criterion = VIDLoss(ONE_PAIR)

    def variance(maps):
        return torch.nn.functional.softplus(torch.linspace(-1, 2, maps.shape[1], dtype=maps.dtype)) + 1e-5

    def other(student, teacher):
        return criterion(io((student, variance(student).view(1, -1, 1, 1))), io(teacher))

    mine = ours("vid")
    return lambda s, t: mine(s, t, variance=variance(s)), other


@pair("pad", NAME, "vectors")
def pad():
    from torchdistill.losses.mid_level import PADL2Loss

    criterion = PADL2Loss(".", ".")

    @cache
    def made(shape, dtype):
        return generate(shape, 0.9, 0.8).to(dtype)

    def log_variance(vectors):
        return made(vectors.shape, vectors.dtype)

    def other(student, teacher):
        return criterion({**io(student), "var_estimator": {"output": log_variance(student)}}, io(teacher))

    mine = ours("pad")
    return lambda s, t: mine(s, t, log_variance=log_variance(s)), other


@pair("rkd_distance", NAME, "vectors", tolerance=1e-7)
def rkd_distance():
    """Theirs takes distances from products, which costs it digits."""
    return ours("rkd_distance"), theirs("RKDLoss", ".", ".", 1.0, 0.0, "mean")


@pair("rkd_angle", NAME, "vectors")
def rkd_angle():
    return ours("rkd_angle"), theirs("RKDLoss", ".", ".", 0.0, 1.0, "mean")


@pair("similarity_preserving", NAME, "maps")
def similarities_by_the_one_norm():
    return ours("similarity_preserving", norm=1), theirs("SPKDLoss", ".", ".", "batchmean")


@pair("similarity_preserving", NAME, "maps", deviates="SPKDLoss passes 1 as the norm where it means the dimension")
def similarities_of_the_paper():
    return ours("similarity_preserving"), theirs("SPKDLoss", ".", ".", "batchmean")


@pair("pkt", NAME, "vectors")
def pkt():
    return ours("pkt"), theirs("PKTLoss", *PLACE)


def correlations(kernel):
    config = {"type": kernel, "gamma": 0.4, "max_p": 2}
    mine = ours("correlation_congruence", kernel=kernel, normalize=False)
    other = theirs("CCKDLoss", ".", ".", config, "batchmean")  # the root of the sum, divided by B²
    return lambda s, t: (mine(s, t) * len(s) ** 2).sqrt() / len(s) ** 2, other


@pair("correlation_congruence", NAME, "vectors")
def gaussian_correlations():
    return correlations("gaussian")


@pair("correlation_congruence", NAME, "vectors")
def bilinear_correlations():
    return correlations("bilinear")


@pair("correlation_congruence", NAME, "vectors", deviates="CCKDLoss takes a root, and does not normalise")
def correlations_of_the_paper():
    return ours("correlation_congruence"), correlations("gaussian")[1]


@pair("hcl", NAME, "maps")
def hierarchical_context():
    from torchdistill.losses.mid_level import HierarchicalContextLoss

    criterion = HierarchicalContextLoss(*PLACE)
    return ours("hcl"), lambda s, t: criterion(io((s, None)), io(t))


@pair("srd", NAME, "vectors")
def srd():
    from torchdistill.losses.mid_level import SRDLoss

    features, logits = ("features", "output"), ("logits", "output")
    criterion = SRDLoss(*features, *features, *logits, *logits, exponent=4.0)

    def both(vectors):
        return {"features": {"output": vectors}, "logits": {"output": vectors.detach() * 0}}  # no divergence

    mine = ours("srd", standardize=False)
    return lambda s, t: 2 * mine(s, t), lambda s, t: criterion(both(s), both(t))


@pair("crd", NAME, "vectors")
def noise_contrast_of_crd():
    from torchdistill.losses.mid_level import CRDLoss

    settings = SimpleNamespace(num_samples=100, eps=1e-7)

    def ratios(vectors):
        return vectors.exp() / 50

    return (
        lambda s, t: noise_contrast(ratios(s), examples=100).mean(),
        lambda s, t: CRDLoss.compute_contrast_loss(settings, ratios(s)),
    )
