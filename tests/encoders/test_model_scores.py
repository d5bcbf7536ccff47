"""Scores from models: published heads, similarities, classes; and what their values depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_networks import save_causal_language_model, save_classifier, save_clip, save_language_model
from torch import Tensor, nn

from pipeline.config.options import ConfigError
from pipeline.curation.scorers import get_scorers
from pipeline.encoders import language_model
from pipeline.encoders.heads import load_head
from pipeline.encoders.model_scores import ModelScorer, fingerprint, model_scorers

pytestmark = pytest.mark.filterwarnings("ignore")


class Detector(nn.Module):
    """With the names of LAION's CLIP-based NSFW detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.rand(12))
        self.norm.register_buffer("variance", torch.rand(12) + 0.5)
        self.linear_1, self.linear_2, self.linear_3 = nn.Linear(12, 8), nn.Linear(8, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.norm.mean) / self.norm.variance.sqrt()
        return torch.sigmoid(self.linear_3(torch.relu(self.linear_2(torch.relu(self.linear_1(x))))))


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def published(name: str) -> nn.Module:
    """Networks of LAION's layouts: their modules, with smaller ones."""
    between = (nn.ReLU(), nn.Dropout(0.2))
    return {
        "aesthetic 1": lambda: nn.Linear(12, 1),
        "aesthetic 2": lambda: Layers(
            nn.Linear(12, 9), nn.Dropout(0.2), nn.Linear(9, 7), nn.Dropout(0.1), nn.Linear(7, 5), nn.Linear(5, 1)
        ),
        "NSFW of H/14": lambda: Layers(
            nn.Linear(12, 9), *between, nn.Linear(9, 16), *between, nn.Linear(16, 5), nn.Linear(5, 1)
        ),
        "NSFW of L/14": Detector,
    }[name]()


@torch.no_grad()
@pytest.mark.parametrize("name", ["aesthetic 1", "aesthetic 2", "NSFW of H/14", "NSFW of L/14"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_heads_load_as_they_are(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = published(name).eval()
    file = tmp_path / f"head{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), file)
    else:
        save_file(network.state_dict(), file)
    x = torch.randn(6, 12)
    head = load_head(str(file), "scorers=head")
    assert (head.inputs, head.outputs) == (12, 1)
    expected = network(torch.nn.functional.normalize(x, dim=-1))
    np.testing.assert_allclose(head(x.numpy()), expected.numpy(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_activations_can_be_said(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = Layers(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    save_file(network.state_dict(), tmp_path / "plain.safetensors")
    save_file(network.state_dict(), tmp_path / "said.safetensors", {"activation": "relu"})
    x = torch.nn.functional.normalize(torch.randn(6, 12), dim=-1)
    plain, *others = (
        load_head(str(tmp_path / name), "scorers=head")
        for name in ("plain.safetensors", "plain.safetensors#activation=relu", "said.safetensors")
    )
    for head in others:
        np.testing.assert_allclose(head(x.numpy()), network(x).numpy(), rtol=1e-4, atol=1e-6)
    assert not np.allclose(plain(x.numpy()), network(x).numpy(), atol=1e-3)
    assert len({head.digest for head in (plain, *others)}) == 3


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    save_file({"layers.0.weight": torch.ones(3, 4), "layers.1.weight": torch.ones(1, 4)}, tmp_path / "odd.safetensors")
    save_file({"weight": torch.full((1, 4), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 30)
    for spec, message in {
        "evil.pth": "holds Python objects, not just tensors",
        "list.pth": "contains no state dictionary",
        "other.safetensors": "holds no linear layers",
        "odd.safetensors": r"layers.1.weight \[1, 4\] is not a linear layer that fits",
        "nan.safetensors": "values that are not numbers",
        "broken.safetensors": "cannot be loaded",
        "nowhere.safetensors": "cannot be loaded: .*No such file",
        "other.safetensors#activation=gelu": "write activation=none or activation=relu",
    }.items():
        with pytest.raises(ConfigError, match=f"^scorers=head: .*{message}"):
            load_head(str(tmp_path / spec), "scorers=head")
    assert not (tmp_path / "ran").exists()


def scorers(*names: str) -> dict[str, ModelScorer]:
    return model_scorers(get_scorers(names), "cpu", "float32")


def crops(scorer: ModelScorer, count: int) -> list[np.ndarray]:
    assert scorer.crop is not None
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (scorer.crop.edge, scorer.crop.edge, 3), np.uint8) for _ in range(count)]


def scored(scorer: ModelScorer, images: list[np.ndarray], captions: list[str], embeddings: Any = None) -> list:
    """All at once, on the CPU."""
    given = torch.from_numpy(np.stack(images)) if images else None
    return scorer.values([tensor.numpy() for tensor in scorer.encode(given, captions)], captions, embeddings)


@torch.no_grad()
def test_similarities_are_those_of_direct_calls(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    place = save_clip(tmp_path)
    found = scorers(f"clip_similarity:hf:{place}")
    (scorer,) = found.values()
    images, captions = crops(scorer, 3), ["red dog", "", "a cat"]
    assert not scorer.wants_embedding and scorer.columns == {"clip_similarity": "float"}
    (values,) = scored(scorer, images, captions)
    model = CLIPModel.from_pretrained(place).eval()
    mean, std = (np.array(x) for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    x = torch.from_numpy(((np.stack(images) / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    tokens = CLIPTokenizer.from_pretrained(place)(captions, padding="max_length", max_length=12, return_tensors="pt")
    expected = torch.cosine_similarity(model.get_image_features(x), model.get_text_features(**tokens))
    assert values[1] is None, "a sample without a caption"
    np.testing.assert_allclose([values[0], values[2]], expected[[0, 2]], atol=1e-5)

    both = scorers(f"clip_similarity:hf:{place}", f"embedding:hf:{place}")
    embedding, similarity = both.values()
    assert similarity.wants_embedding and similarity.crop is None
    (vectors,) = scored(embedding, images, captions)
    assert vectors[0].dtype == np.float16 and embedding.columns == {"embedding": "vector:8"}
    (again,) = scored(similarity, [], captions, np.stack(vectors))
    np.testing.assert_allclose([again[0], again[2]], expected[[0, 2]], atol=2e-3)
    assert fingerprint(similarity.describe()) != fingerprint(scorer.describe()), (
        "float16 vectors are not quite the same"
    )


@torch.no_grad()
def test_a_heads_values_depend_on_the_embedding_too(tmp_path: Path) -> None:
    torch.save(nn.Linear(192, 1).state_dict(), tmp_path / "taste.pth")
    from pipeline.encoders.preprocessing import Preprocessing
    from pipeline.encoders.vision import save_program

    network = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2))
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        network = nn.Sequential(nn.Conv2d(3, 4, 8, 2), nn.Flatten(2), nn.Linear(169, 192))
        save_program(network, tmp_path / f"{name}.pt2", 32, Preprocessing())
    head = f"head:{tmp_path / 'taste.pth'}"
    described = [
        fingerprint(scorers(f"embedding:{model}", head)[head].describe())
        for model in ("embedded", f"program:{tmp_path / 'a.pt2'}", f"program:{tmp_path / 'b.pt2'}")
    ]
    assert len(set(described)) == 3
    (values,) = scored(scorers("embedding:embedded", head)[head], [], [""] * 5, np.eye(192, dtype=np.float16)[:5])
    assert scorers("embedding:embedded", head)[head].columns == {"taste": "float"} and len(values) == 5


@torch.no_grad()
def test_classes_and_their_probabilities(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    name = f"classifier:{save_classifier(tmp_path)}"
    scorer = scorers(name)[name]
    images = crops(scorer, 8)
    names, shares = scored(scorer, images, [""] * 8)
    x = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1).float()
    expected = ViTForImageClassification.from_pretrained(tmp_path).eval()(x).logits.softmax(-1)
    assert names == [("dog", "cat", "car")[index] for index in expected.argmax(-1)]
    np.testing.assert_allclose(shares, expected.max(-1).values, atol=1e-5)
    assert scorer.columns == {"class_name": "str", "class_probability": "float"}


@torch.no_grad()
def test_perplexity_is_that_of_transformers_own_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = f"perplexity:{save_causal_language_model(tmp_path)}"
    captions = ["a red dog", "", "describe a cat a dog a red cat", "dog", "  ", "a cat"]
    model, tokenizer = (kind.from_pretrained(tmp_path) for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected = []
    for caption in captions:
        ids = tokenizer(caption, return_tensors="pt")["input_ids"]
        expected.append(float(model(input_ids=ids.long(), labels=ids.long()).loss.exp()) if ids.shape[1] > 1 else None)
    assert [value is None for value in expected] == [False, True, False, True, True, False]
    scorer = scorers(name)[name]
    assert scorer.columns == {"perplexity": "float"} and scorer.crop is None
    for at_once in (language_model._LOGITS, 1):
        monkeypatch.setattr(language_model, "_LOGITS", at_once)
        (values,) = scored(scorer, [], captions)
        assert values == [one if one is None else pytest.approx(one, rel=1e-4) for one in expected]
    assert scored(scorer, [], ["", " "]) == [[None, None]]


def test_a_model_that_predicts_no_tokens_has_no_perplexity(tmp_path: Path) -> None:
    save_language_model(tmp_path)
    with pytest.raises(ConfigError, match=r"scorers=perplexity:.* does not predict tokens: it has no lm_head"):
        scorers(f"perplexity:{tmp_path}")
    with pytest.raises(ConfigError, match="scorers=perplexity:nowhere/"):
        scorers("perplexity:nowhere/")


def test_scorers_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(10, 1).state_dict(), tmp_path / "small.pth")
    torch.save(nn.Linear(192, 1).state_dict(), tmp_path / "good.pth")
    (tmp_path / "other").mkdir()
    torch.save(nn.Linear(192, 1).state_dict(), tmp_path / "other/good.pth")
    with pytest.raises(ConfigError, match="a head is computed from an embedding: add"):
        scorers(f"head:{tmp_path / 'good.pth'}")
    with pytest.raises(ConfigError, match="takes 10 numbers; the embedding has 192"):
        scorers("embedding:embedded", f"head:{tmp_path / 'small.pth'}")
    with pytest.raises(ConfigError, match="two of them fill the column good"):
        scorers("embedding:embedded", f"head:{tmp_path / 'good.pth'}", f"head:{tmp_path / 'other/good.pth'}")
    with pytest.raises(ConfigError, match="there can be one embedding"):
        scorers("embedding:embedded", "embedding:program:x")
