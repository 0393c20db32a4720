"""The bridge to vision-language training: a student in the hands of LLaVA, fed with our features."""

import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert import to_torch  # noqa: E402
from convert.llava_tower import LlavaVisionTower  # noqa: E402
from eupe_jax.models import rope  # noqa: E402
from tests.convert.conftest import make_encoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch, not ours


@pytest.fixture(scope="module", params=["vit", "convnext"])
def exported(request, tmp_path_factory, photographs):
    """A student, the folder it was written to, pixels, and its own features of them."""
    encoder = request.getfixturevalue(request.param)
    if request.param == "vit":  # transformers computes its RoPE periods
        encoder = make_encoder(encoder.name, encoder.overrides)
        encoder.variables["buffers"]["rope_periods"] = np.asarray(rope.rope_periods(32), np.float32)
    folder = tmp_path_factory.mktemp("exported") / "student"
    to_torch.convert(encoder, folder, images=photographs, layout="transformers")
    pixels = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    features = jax.jit(lambda v, x: encoder.module.apply(v, x, method="features"))(encoder.variables, pixels)
    return encoder, folder, pixels, features


def nchw(pixels):
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def test_tower_gives_our_patch_tokens_at_any_resolution(exported):
    encoder, folder, pixels, features = exported
    tower = LlavaVisionTower(folder)
    tokens = tower(nchw(pixels))
    stride = 64 // features["patches"].shape[1]
    np.testing.assert_allclose(tokens.numpy(), features["patches"].reshape(2, -1, 64), rtol=0, atol=2e-5)
    assert tokens.shape == (2, tower.num_patches, tower.hidden_size)
    listed = tower(list(nchw(pixels)))
    np.testing.assert_allclose(torch.cat(listed).numpy(), tokens.numpy(), rtol=0, atol=1e-5)
    large = LlavaVisionTower(folder, resolution=96)
    assert large.image_processor.crop_size["height"] == 96
    assert large.num_patches == (96 // stride) ** 2
    picture = large.image_processor(np.zeros((40, 50, 3), np.uint8), return_tensors="pt")["pixel_values"]
    assert large(picture).shape == (1, large.num_patches, 64)
    np.testing.assert_allclose(picture[0, :, 0, 0], -np.float32(encoder.mean) / np.float32(encoder.std), atol=1e-5)
    with pytest.raises(ValueError, match="multiple"):
        LlavaVisionTower(folder, resolution=100)


def test_tower_stays_calm_and_frozen_while_a_projector_trains(exported):
    """One LLaVA-style step: projected patch tokens before text embeddings of a small language model."""
    _, folder, pixels, features = exported
    torch.manual_seed(0)
    tower = LlavaVisionTower(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50))
    projector = torch.nn.Linear(tower.hidden_size, 32)
    model = torch.nn.ModuleList([tower, projector, language]).train()
    text = torch.tensor([[1, 7, 3]] * 2)

    def loss():
        embedded = torch.cat([projector(tower(nchw(pixels))), language.get_input_embeddings()(text)], dim=1)
        labels = torch.cat([torch.full((2, tower.num_patches), -100), text], dim=1)
        return language(inputs_embeds=embedded, labels=labels).loss

    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = loss()
    before.backward()
    optimiser.step()
    assert loss() < before
    assert all(p.grad is None for p in tower.parameters()) and projector.weight.grad.abs().max() > 0
    np.testing.assert_allclose(tower(nchw(pixels)), features["patches"].reshape(2, -1, 64), rtol=0, atol=2e-5)


def test_transformers_own_llava_sees_our_tokens(vit, exported):
    """LLaVA of `transformers` takes the hidden states before the final norm, prefix tokens included."""
    encoder, folder, pixels, features = exported
    if encoder.name != "eupe_vitt16":
        pytest.skip("its LLaVA takes token sequences, which a ConvNeXt's hidden states are not")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
        )
        config = transformers.LlavaConfig(
            vision_config=transformers.AutoConfig.from_pretrained(folder),
            text_config=text,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_token_index=99,
            image_seq_length=21,
        )
        llava = transformers.LlavaForConditionalGeneration(config)
        llava.model.vision_tower = transformers.AutoModel.from_pretrained(folder)
    seen = []
    llava.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
    ids = torch.tensor([[99] * 21 + [1, 2]] * 2)
    with torch.inference_mode():
        logits = llava.eval()(input_ids=ids, pixel_values=nchw(pixels), attention_mask=torch.ones_like(ids)).logits
    assert logits.shape == (2, 23, 100) and bool(logits.isfinite().all())
    np.testing.assert_allclose(seen[0], features["prenorm"], rtol=0, atol=2e-5)
