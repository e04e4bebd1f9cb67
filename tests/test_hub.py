"""A model that cannot be had is told of at once."""

import pytest
import transformers

from limbeck import hub
from limbeck.pretrained import load_config, load_masked_lm


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    hub.answers.cache_clear()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    hub.answers.cache_clear()


@pytest.mark.parametrize("load", [load_config, load_masked_lm])
def test_a_hub_that_nobody_reaches_is_said_at_once(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    def asked(*names, **options):
        pytest.fail("the client asked, which tries again and again")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)
    with pytest.raises(ValueError, match="from 'nowhere/at-all': there is no such folder here, none of that name"):
        load("nowhere/at-all")


def test_what_was_downloaded_or_may_be_behind_a_proxy_is_left_to_the_client(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub.answers()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/{name}/{file}")
    hub.check_findable("owner/name")
    monkeypatch.undo()
    hub.answers.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub.answers()
