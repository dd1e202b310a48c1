"""Which network belongs to which tensor (T11)."""

import pytest

from zotune.errors import ConfigError
from zotune.finetuner.names import assign, listed, shuffled

TIED = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
UNTIED = [*TIED, "lm_head.weight"]


@pytest.mark.filterwarnings("error")
def test_equal_names_in_any_order():
    assert assign(TIED, TIED) == [0, 1, 2]
    assert assign(TIED, TIED[::-1]) == [2, 1, 0]
    assert assign(UNTIED, UNTIED) == [0, 1, 2, 3]


def test_head_of_a_tied_model_is_left_out():
    with pytest.warns(UserWarning, match=r"it is tied to the embedding, or not trained\): lm_head"):
        assert assign(UNTIED, TIED) == [0, 1, 2]


def test_head_of_its_own_uses_the_embedding_s_network():
    with pytest.warns(UserWarning, match=r"lm_head\.weight uses the network of model\.embed_tokens\.weight"):
        assert assign(TIED, UNTIED) == [0, 1, 2, 0]


def test_head_without_an_embedding_is_missing():
    with pytest.raises(ConfigError, match=r"no network for 1 of 2 trained tensors: lm_head\.weight"):
        assign(TIED[1:], [TIED[1], "lm_head.weight"])


def test_other_networks_left_out_are_named():
    with pytest.warns(UserWarning, match=r"no such tensor is trained\): model\.norm\.weight"):
        assert assign(TIED, TIED[:2]) == [0, 1]


def test_missing_networks():
    wanted = [*TIED, "model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConfigError, match="missing='rms'"):
        assign(TIED, wanted)
    assert assign(TIED, wanted, missing="rms") == [0, 1, 2, None]


def test_nothing_known_is_an_error_under_either_policy():
    for missing in ("error", "rms"):
        with pytest.raises(ConfigError, match="2 of 2 trained tensors"):
            assign(TIED, ["q_proj.lora_A.weight", "q_proj.lora_B.weight"], missing)


def test_shuffled_deals_each_network_once_and_leaves_gaps():
    wanted = [*(f"layer{i}.weight" for i in range(20)), "other.weight"]
    found = [*range(20), None]
    dealt = shuffled(found, wanted, seed=3)
    assert sorted(dealt[:20]) == list(range(20))
    assert dealt[20] is None
    assert dealt[:20] != list(range(20))
    assert shuffled(found[::-1], wanted[::-1], seed=3) == dealt[::-1]


def test_long_lists_are_cut():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(9)]) == "0, 1, 2, 3, 4 and 4 more"
