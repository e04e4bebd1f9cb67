"""TextBrewer's and TRL's losses."""

from functools import partial

import torch

from tests.oracles.pairs import labels_for, mask_for, ours, pair

BREWER, TRL = "textbrewer", "trl"


def brewed(name, **options):
    """A loss of TextBrewer."""
    from textbrewer import losses

    return partial(getattr(losses, name), **options)


def with_mask(name):
    """A loss of TextBrewer over the valid tokens."""
    function = brewed(name)
    return lambda s, t: function(s, t, mask_for(s))


def ours_with_mask(loss, **options):
    mine = ours(loss, **options)
    return lambda s, t: mine(s, t, mask=mask_for(s))


@pair("soft_cross_entropy", BREWER, "tokens")
def kd_ce_loss():
    mine = ours("soft_cross_entropy", temperature=4.0)  # theirs has no T²
    return lambda s, t: mine(s, t) / 16, brewed("kd_ce_loss", temperature=4.0)


@pair("soft_cross_entropy", BREWER, "tokens")
def kd_ce_loss_with_own_temperatures():
    def warmth(logits):
        return torch.linspace(1, 5, logits[..., 0].numel(), dtype=logits.dtype).view(logits.shape[:-1])

    return (
        lambda s, t: (_per_position("soft_cross_entropy", s, t, warmth(s)) / warmth(s) ** 2).mean(),
        lambda s, t: brewed("kd_ce_loss")(s, t, warmth(s)),
    )


def _per_position(loss, student, teacher, temperature):
    from limbeck.losses import LOSSES

    return LOSSES.get(loss)(student, teacher, temperature=temperature)


@pair("soft_cross_entropy", BREWER, "tokens", deviates="no T²: the gradient falls with it")
def kd_ce_loss_as_it_is():
    return ours("soft_cross_entropy", temperature=4.0), brewed("kd_ce_loss", temperature=4.0)


@pair("logit_mse", BREWER, "tokens")
def kd_mse_loss():
    return ours("logit_mse", temperature=4.0), brewed("kd_mse_loss", temperature=4.0)


@pair("mse", BREWER, "hidden")
def hid_mse_loss():
    return ours("mse"), brewed("hid_mse_loss")


@pair("mse", BREWER, "hidden")
def hid_mse_loss_with_mask():
    return ours_with_mask("mse"), with_mask("hid_mse_loss")


@pair("cosine", BREWER, "hidden")
def cos_loss():
    return ours("cosine"), brewed("cos_loss")


@pair("cosine", BREWER, "hidden")
def cos_loss_with_mask():
    return ours_with_mask("cosine"), with_mask("cos_loss")


@pair("normalized_mse", BREWER, "hidden")
def pkd_loss():
    mine = ours("normalized_mse")
    return lambda s, t: mine(s[:, 0], t[:, 0]), brewed("pkd_loss")


@pair("attention_mse", BREWER, "attention")
def att_mse_loss_with_mask():
    return ours_with_mask("attention_mse", average="pairs"), with_mask("att_mse_loss")


@pair("attention_mse", BREWER, "attention")
def att_mse_sum_loss_with_mask():
    return ours_with_mask("attention_mse", heads="sum", average="pairs"), with_mask("att_mse_sum_loss")


@pair("attention_mse", BREWER, "attention")
def att_mse_loss_without_mask():
    return ours("attention_mse", zero_below=-1e-3), brewed("att_mse_loss")


@pair("attention_mse", BREWER, "attention", deviates="without a mask, every negative score becomes zero")
def att_mse_loss_of_all_scores():
    return ours("attention_mse"), brewed("att_mse_loss")


@pair("attention_kl", BREWER, "attention")
def att_ce_loss_with_mask():
    return ours_with_mask("attention_kl", kind="cross_entropy", renormalize=False), with_mask("att_ce_loss")


@pair("attention_kl", BREWER, "attention")
def att_ce_mean_loss_with_mask():
    options = {"kind": "cross_entropy", "renormalize": False, "heads": "mean"}
    return ours_with_mask("attention_kl", **options), with_mask("att_ce_mean_loss")


@pair(
    "attention_kl", BREWER, "attention", deviates="without a mask, keys with a negative teacher score are dropped"
)
def att_ce_loss_without_mask():
    return ours("attention_kl", kind="cross_entropy"), brewed("att_ce_loss")


def both(function):
    """Two layers, from a tensor that holds both."""
    return lambda s, t: function(s.unbind(0), t.unbind(0))


@pair("fsp", BREWER, "hidden pairs")
def fsp_loss():
    return both(ours("fsp")), both(brewed("fsp_loss"))


@pair("fsp", BREWER, "hidden pairs")
def fsp_loss_with_mask():
    def valid(stacked):
        return mask_for(stacked[0])

    mine = ours("fsp")
    return (
        lambda s, t: mine(s.unbind(0), t.unbind(0), mask=valid(s)),
        lambda s, t: brewed("fsp_loss")(s.unbind(0), t.unbind(0), valid(s)),
    )


@pair("mmd", BREWER, "hidden pairs")
def mmd_loss():
    return both(ours("mmd")), both(brewed("mmd_loss"))


@pair(
    "mmd", BREWER, "hidden pairs", deviates="with a mask, products are divided by the length instead of the width"
)
def mmd_loss_with_mask():
    def valid(stacked):
        return mask_for(stacked[0])

    mine = ours("mmd")
    return (
        lambda s, t: mine(s.unbind(0), t.unbind(0), mask=valid(s)),
        lambda s, t: brewed("mmd_loss")(s.unbind(0), t.unbind(0), valid(s)),
    )


def jsd(**options):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def other(student, teacher):
        labels = torch.where(mask_for(student) > 0, labels_for(student), -100)
        return GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, **options)

    return other


@pair("forward_kl", TRL, "tokens")
def gkd_of_beta_0():
    return ours_with_mask("forward_kl"), jsd(beta=0)


@pair("reverse_kl", TRL, "tokens")
def gkd_of_beta_1():
    return ours_with_mask("reverse_kl"), jsd(beta=1)


@pair("js_divergence", TRL, "tokens")
def gkd_of_beta_half():
    return ours_with_mask("js_divergence"), jsd(beta=0.5)


@pair("js_divergence", TRL, "tokens")
def gkd_of_beta_tenth_warm():
    mine = ours_with_mask("js_divergence", beta=0.1, temperature=2.0)  # theirs has no T²
    return lambda s, t: mine(s, t) / 4, jsd(beta=0.1, temperature=2.0)


@pair("js_divergence", TRL, "tokens", deviates="no T²: the gradient falls with it")
def gkd_warm_as_it_is():
    return ours_with_mask("js_divergence", temperature=2.0), jsd(beta=0.5, temperature=2.0)
