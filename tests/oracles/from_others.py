"""Losses of ModelOpt, Keras, sentence-transformers, torchmetrics, SciPy and PyTorch itself."""

import torch
import torch.nn.functional as F  # noqa: N812

from tests.oracles.pairs import labels_for, ours, pair

MODELOPT, KERAS, SENTENCES = "nvidia-modelopt", "keras", "sentence-transformers"
METRICS, SCIPY, TORCH = "torchmetrics", "scipy", "torch"


# ---- ModelOpt --------------------------------------------------------------------------------------------------


@pair("forward_kl", MODELOPT, "logits")
def logits_distillation():
    import modelopt.torch.distill as mtd

    return ours("forward_kl", temperature=4.0), mtd.LogitsDistillationLoss(4.0, "batchmean")


@pair("forward_kl", MODELOPT, "logits", deviates="the default reduction divides by the classes too")
def logits_distillation_by_default():
    import modelopt.torch.distill as mtd

    return ours("forward_kl", temperature=4.0), mtd.LogitsDistillationLoss(4.0)


@pair("mft", MODELOPT, "logits")
def minifinetuning():
    import modelopt.torch.distill as mtd

    criterion = mtd.MFTLoss(temperature=2.0, threshold=0.2)
    mine = ours("mft", temperature=2.0)
    return (
        lambda s, t: mine(s, t, labels=labels_for(s)),
        lambda s, t: criterion(s, t, labels_for(s)),
    )


@pair("mgd", MODELOPT, "maps")
def masked_generation():
    import modelopt.torch.distill as mtd

    criteria = {}

    def other(student, teacher):
        channels = student.shape[1]
        if channels not in criteria:
            criteria[channels] = mtd.MGDLoss(channels, channels, alpha_mgd=0.5, lambda_mgd=0.0)
            criteria[channels].generation = torch.nn.Identity()  # the comparison alone, nothing masked
        return criteria[channels](student, teacher)

    mine = ours("mgd", alpha=0.5)  # the sum of an example, of which theirs is the mean
    return lambda s, t: mine(s, t) / s[0].numel(), other


# ---- Keras -----------------------------------------------------------------------------------------------------


@pair("forward_kl", KERAS, "logits", tolerance=1e-5)
def keras_divergence():
    """It computes in float32 and clips probabilities at 1e-7."""
    import keras

    criterion = keras.distillation.LogitsDistillation(temperature=4.0, loss=keras.losses.KLDivergence())
    return ours("forward_kl", temperature=4.0), lambda s, t: criterion.compute_loss(t, s)


@pair("forward_kl", KERAS, "logits", deviates="the default loss is a divergence of clipped raw logits, without T²")
def keras_by_default():
    import keras

    criterion = keras.distillation.LogitsDistillation(temperature=4.0)
    return ours("forward_kl", temperature=4.0), lambda s, t: criterion.compute_loss(t, s)


@pair("mse", KERAS, "hidden", tolerance=1e-5)
def keras_features():
    import keras

    criterion = keras.distillation.FeatureDistillation(loss=keras.losses.MeanSquaredError())
    return ours("mse"), lambda s, t: criterion.compute_loss(t, s)


# ---- sentence-transformers -------------------------------------------------------------------------------------


def sentences(name, **options):
    """A loss of sentence-transformers without its model."""
    from sentence_transformers.sentence_transformer import losses

    return getattr(losses, name)(None, **options).compute_loss_from_embeddings


def as_embeddings(scores):
    """A query and candidates whose dot products are these scores."""
    return [torch.ones_like(scores[:, :1]), *scores.split(1, dim=1)]


@pair("margin_mse", SENTENCES, "scores")
def margins():
    other = sentences("MarginMSELoss")
    return ours("margin_mse"), lambda s, t: other(as_embeddings(s), t)


@pair("listwise_kl", SENTENCES, "scores")
def candidates():
    other = sentences("DistillKLDivLoss", temperature=2.0)
    return ours("listwise_kl", temperature=2.0), lambda s, t: other(as_embeddings(s), t)


@pair("infonce", SENTENCES, "vectors")
def ranking():
    other = sentences("MultipleNegativesRankingLoss")
    return ours("infonce"), lambda s, t: other([s, t], None)


@pair("infonce", SENTENCES, "vectors")
def ranking_both_ways():
    other = sentences(
        "MultipleNegativesRankingLoss",
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
        scale=3.0,
    )
    return ours("infonce", scale=3.0, symmetric=True), lambda s, t: other([s, t], None)


@pair("mse", SENTENCES, "vectors")
def embeddings_by_squares():
    other = sentences("EmbedDistillLoss", distance_metric="mse")
    return ours("mse"), lambda s, t: other([s], [t])


@pair("cosine", SENTENCES, "vectors")
def embeddings_by_cosine():
    other = sentences("EmbedDistillLoss", distance_metric="cosine")
    return ours("cosine"), lambda s, t: other([s], [t])


# ---- torchmetrics ----------------------------------------------------------------------------------------------


def metric(left, right):
    from torchmetrics.functional import kl_divergence

    return kl_divergence(left.log_softmax(-1), right.log_softmax(-1), log_prob=True)


@pair("forward_kl", METRICS, "logits")
def divergence_of_the_teacher():
    import torchmetrics  # noqa: F401

    return ours("forward_kl", temperature=3.0), lambda s, t: 9 * metric(t / 3, s / 3)


@pair("reverse_kl", METRICS, "logits")
def divergence_of_the_student():
    import torchmetrics  # noqa: F401

    return ours("reverse_kl"), lambda s, t: metric(s, t)


@pair("attention_kl", METRICS, "attention")
def divergence_of_attention():
    import torchmetrics  # noqa: F401

    return ours("attention_kl"), lambda s, t: metric(t.flatten(0, 2), s.flatten(0, 2))


@pair("cwd", METRICS, "maps")
def divergence_of_channels():
    import torchmetrics  # noqa: F401

    def rows(maps):
        return maps.flatten(2).flatten(0, 1) / 2

    return ours("cwd", temperature=2.0), lambda s, t: 4 * metric(rows(t), rows(s))


@pair("cosine", METRICS, "vectors")
def diagonal_of_cosines():
    from torchmetrics.functional import pairwise_cosine_similarity

    return ours("cosine"), lambda s, t: 1 - pairwise_cosine_similarity(s, t).diagonal().mean()


# ---- SciPy: values alone, since it knows no gradients ----------------------------------------------------------


def probabilities(logits):
    return logits.detach().softmax(-1).numpy()


@pair("forward_kl", SCIPY, "logits", timed=False)
def relative_entropy():
    from scipy.stats import entropy

    return ours("forward_kl"), lambda s, t: entropy(probabilities(t), probabilities(s), axis=-1).mean()


@pair("js_divergence", SCIPY, "logits", timed=False)
def jensen_shannon():
    from scipy.spatial.distance import jensenshannon

    return ours("js_divergence"), lambda s, t: (
        jensenshannon(probabilities(t), probabilities(s), axis=-1) ** 2
    ).mean()


@pair("total_variation", SCIPY, "logits", timed=False)
def city_block():
    from scipy.spatial.distance import cityblock

    def other(student, teacher):
        rows = zip(probabilities(student), probabilities(teacher), strict=True)
        return sum(cityblock(q, p) for q, p in rows) / 2 / len(student)

    return ours("total_variation"), other


# ---- PyTorch's own ---------------------------------------------------------------------------------------------


@pair("cross_entropy", TORCH, "logits")
def cross_entropy():
    mine = ours("cross_entropy", label_smoothing=0.1)
    return (
        lambda s, t: mine(s, labels_for(s)),
        lambda s, t: F.cross_entropy(s, labels_for(s), label_smoothing=0.1),
    )


@pair("binary_cross_entropy", TORCH, "logits")
def binary_cross_entropy():
    def wanted(logits):
        return (torch.arange(logits.numel()).view(logits.shape) % 3 == 0).to(logits.dtype)

    mine = ours("binary_cross_entropy")
    return (
        lambda s, t: mine(s, wanted(s)),
        lambda s, t: F.binary_cross_entropy_with_logits(s, wanted(s)),
    )


@pair("binary_kl", TORCH, "logits")
def binary_divergence():
    def other(student, teacher):
        p = teacher.sigmoid()
        entropy = F.binary_cross_entropy(p, p, reduction="none")
        return (F.binary_cross_entropy_with_logits(student, p, reduction="none") - entropy).sum(-1).mean()

    return ours("binary_kl"), other


@pair("soft_cross_entropy", TORCH, "logits")
def soft_targets():
    return ours("soft_cross_entropy"), lambda s, t: F.cross_entropy(s, t.softmax(-1))


@pair("hard_label", TORCH, "logits")
def hard_targets():
    return ours("hard_label"), lambda s, t: F.cross_entropy(s, t.argmax(-1))


@pair("cosine", TORCH, "vectors")
def cosine_embedding():
    return ours("cosine"), lambda s, t: F.cosine_embedding_loss(s, t, torch.ones(len(s)))
