"""Another input size, another pooling and several layers: each vector equals a plain computation by the library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.encoders import torchvision_models
from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.delta import Delta, write_delta
from mmfeat.encoders.layers import repooled, try_out
from mmfeat.encoders.pixels import check_size
from mmfeat.encoders.registry import describe_encoders, kept_for, load_encoders, load_reference, open_towers
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.errors import ConfigError, EncoderError
from tests.encoders.test_sentence import write_checkpoint
from tests.encoders.tiny_models import TEXTS, contents, write_clip, write_timm, write_torchvision

REGISTERS = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
REGISTERS |= {"class_token": True, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
POOLINGS = ["cls", "mean", "cls+mean"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind -> request: a plain ViT, one with registers as DINOv2 has them, one without a class token that pools by
    attention as SigLIP does, a ConvNet of each library, both kinds of CLIP."""
    root = tmp_path_factory.mktemp("options")
    siglip = {"class_token": False, "global_pool": "map", "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    trunk = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    return {
        "vit": f"timm:{write_timm(root / 'vit', 'test_vit', 160)}",
        "registers": f"timm:{write_timm(root / 'registers', 'vit_small_patch14_reg4_dinov2', **REGISTERS)}",
        "siglip": f"timm:{write_timm(root / 'siglip', 'vit_base_patch16_224', img_size=64, **siglip)}",
        "convnext": f"timm:{write_timm(root / 'convnext', 'test_convnext', 160)}",
        "resnet18": f"resnet18:{write_torchvision(root / 'resnet18.pth', 'resnet18')}",
        "clip": f"clip:{write_clip(root / 'clip')}",
        "clip-late": f"clip:{write_clip(root / 'clip-late', {'final_ln_after_pool': True, 'pool_type': 'avg'})}",
        "clip-timm": f"clip:{write_clip(root / 'clip-timm', trunk)}",
        "clip-resnet": f"clip:{write_clip(root / 'clip-rn', {'layers': [1] * 4, 'width': 16, 'image_size': 64})}",
    }


def image_tower(request: str, **options: Any) -> Any:
    towers = describe_encoders([request], EncoderOptions(dtype="float32", cleaning="tweet", **options))
    return next(tower for tower in towers if tower.spec.modality == "image")


def vectors(tower: Any) -> np.ndarray:
    (encoder,) = load_encoders([tower], "cpu")
    return np.asarray(encoder.embed([encoder.prepare(picture) for picture in contents("image")])[0])


def assert_parity(tower: Any) -> np.ndarray:
    """The batch of vectors, after a check that each equals the library's own call for one picture."""
    found, reference = vectors(tower), load_reference(tower)
    for vector, picture in zip(found, contents("image"), strict=True):
        np.testing.assert_allclose(vector, reference(picture), atol=1e-5)
    return found


def timm_model(request: str, size: tuple[int, int] | None) -> tuple[Any, torch.Tensor]:
    """A timm model, for another size as its documents build it, and a batch through its own transform."""
    import_torchvision()
    import timm

    name = f"local-dir:{request.partition(':')[2]}"
    fixed = {} if size is None or "convnext" in request else {"img_size": size}
    model = timm.create_model(name, pretrained=True, num_classes=0, **fixed).eval()
    config = timm.data.resolve_data_config({"input_size": (3, *size)} if size else {}, model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    return model, torch.stack([transform(picture) for picture in contents("image")])


@pytest.mark.parametrize(("kind", "size"), [("vit", (96, 128)), ("registers", (96, 40)), ("convnext", (50, 99))])
def test_another_size_equals_timm(kind: str, size: tuple[int, int], folders: dict[str, str]) -> None:
    tower = image_tower(folders[kind], image_size=f"{size[0]}x{size[1]}")
    assert tower.spec.image_size == size
    model, images = timm_model(folders[kind], size)
    with torch.no_grad():
        np.testing.assert_allclose(assert_parity(tower), model(images).numpy(), atol=1e-5)
    assert not np.allclose(vectors(tower), vectors(image_tower(folders[kind])), atol=1e-5)


@pytest.mark.parametrize(("kind", "size"), [("clip", (48, 80)), ("clip-timm", (96, 128))])
def test_another_size_equals_open_clip(kind: str, size: tuple[int, int], folders: dict[str, str]) -> None:
    import open_clip

    tower = image_tower(folders[kind], image_size=f"image={size[0]}x{size[1]}")
    name = f"local-dir:{folders[kind].partition(':')[2]}"
    model, _, transform = open_clip.create_model_and_transforms(name, force_image_size=size)
    images = torch.stack([transform(picture) for picture in contents("image")])
    assert images.shape[2:] == size
    with torch.no_grad():
        np.testing.assert_allclose(assert_parity(tower), model.eval().encode_image(images).numpy(), atol=1e-5)


def test_another_size_of_a_torchvision_network(folders: dict[str, str]) -> None:
    from torchvision.models import ResNet18_Weights, resnet18
    from torchvision.transforms._presets import ImageClassification

    tower = image_tower(folders["resnet18"], image_size="112")
    transform = ImageClassification(crop_size=112, resize_size=128)
    model = resnet18(num_classes=7)
    model.load_state_dict(torch.load(folders["resnet18"].partition(":")[2], weights_only=True))
    model.fc = torch.nn.Identity()
    images = torch.stack([transform(picture) for picture in contents("image")])
    with torch.no_grad():
        np.testing.assert_allclose(assert_parity(tower), model.eval()(images).numpy(), atol=1e-5)
    assert assert_parity(image_tower(folders["resnet18"], image_size="64x128")).shape == (3, 512)
    assert ResNet18_Weights.DEFAULT.transforms().crop_size == [224]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["vit", "registers"])
def test_pooling_and_layers_equal_forward_intermediates(
    kind: str, layers: int, pooling: str, folders: dict[str, str]
) -> None:
    tower = image_tower(folders[kind], image_pooling=pooling, layers=layers)
    model, images = timm_model(folders[kind], None)
    with torch.no_grad():
        seen = model.forward_intermediates(
            images, layers, return_prefix_tokens=True, output_fmt="NLC", norm=True, intermediates_only=True
        )
        patches, prefix = (torch.stack(states).mean(0) for states in zip(*seen, strict=True))
    assert prefix.shape[1] == (1 if kind == "vit" else 5)
    parts = {"cls": prefix[:, 0], "mean": patches.mean(1)}
    expected = torch.cat([parts[name] for name in pooling.split("+")], 1)
    np.testing.assert_allclose(assert_parity(tower), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("options", [{"image_pooling": "mean"}, {"layers": 2}, {"image_pooling": "mean", "layers": 3}])
def test_attention_pooling_makes_way_for_the_mean(options: dict[str, Any], folders: dict[str, str]) -> None:
    assert assert_parity(image_tower(folders["siglip"], **options)).shape == (3, 32)


@pytest.mark.parametrize(
    ("kind", "options", "width"),
    [
        ("clip", {"image_pooling": "cls+mean", "layers": 2}, 32),
        ("clip", {"layers": 2}, 16),
        ("clip-late", {"image_pooling": "cls+mean", "layers": 2}, 32),
        ("clip-late", {"image_pooling": "mean"}, 16),
        ("clip-timm", {"image_pooling": "cls+mean", "layers": 2}, 32),
        ("clip-resnet", {"image_pooling": "mean"}, 512),
        ("resnet18", {"image_pooling": "mean"}, 512),
        ("convnext", {"image_pooling": "mean"}, 64),
    ],
)
def test_poolings_of_other_libraries_equal_their_own_calls(
    kind: str, options: dict[str, Any], width: int, folders: dict[str, str]
) -> None:
    assert assert_parity(image_tower(folders[kind], **options)).shape == (3, width)


def test_a_vit_of_torchvision_has_poolings_and_layers_and_one_size() -> None:
    import_torchvision()
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    torchvision_models.drop_classifier(model)
    spec = EncoderSpec("vit_b_16", "image", "tiny", "", "float32", "float32", '{"crop": [40], "resize": [40]}')
    images = torch.randn(3, 3, 32, 32)
    for pooling in ("tower", *POOLINGS):
        for layers in (1, 2):
            asked = replace(spec, pooling=pooling, layers=layers)
            network = torchvision_models.network_of(model)
            try_out(network, asked, images)
            with torch.no_grad():
                expected = torchvision_models._vectors(model, asked, images)
                torch.testing.assert_close(repooled(network, asked).forward(images), expected, atol=1e-5, rtol=0)
    with pytest.raises(EncoderError, match=r"--image-size 40x40: vit_b_16:tiny does not take it .Wrong image height"):
        check_size(spec, model)


def test_the_models_own_pooling_by_its_name_is_the_models_vector(folders: dict[str, str]) -> None:
    for kind, own in (
        ("vit", "cls"),
        ("clip", "cls"),
        ("clip-late", "mean"),
        ("resnet18", "mean"),
        ("convnext", "mean"),
    ):
        named = image_tower(folders[kind], image_pooling=own)
        assert named.spec.pooling == own
        np.testing.assert_allclose(vectors(named), vectors(image_tower(folders[kind])), atol=1e-5)


def test_tokens_beside_another_pooling_stay_the_models_own(folders: dict[str, str]) -> None:
    options = EncoderOptions(
        dtype="float32", cleaning="tweet", outputs=("pooled", "tokens", "prefix:1"), image_pooling="mean", layers=2
    )
    towers = describe_encoders([folders["registers"]], options)
    plain = describe_encoders(
        [folders["registers"]], EncoderOptions(dtype="float32", cleaning="tweet", outputs=("tokens", "prefix:1"))
    )
    assert [tower.spec for tower in towers[1:]] == [tower.spec for tower in plain]
    found, expected = (load_encoders(each, "cpu")[0] for each in (towers, plain))
    batch = [found.prepare(picture) for picture in contents("image")]
    for one, other in zip(found.embed(batch)[1:], expected.embed(batch), strict=True):
        np.testing.assert_array_equal(np.stack(one), np.stack(other))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vit", {"image_size": "100"}, r"--image-size 100x100: timm:vit does not take it .*multiples of 16$"),
        ("clip", {"image_size": "40x50"}, r"--image-size 40x50: clip.image:clip does not take it .*multiples of 16$"),
        ("clip-resnet", {"image_size": "96"}, r"--image-size 96: clip:clip-rn pools by attention over one size"),
        ("clip-resnet", {"image_pooling": "cls"}, r"no class token; use mean or model"),
        ("resnet18", {"image_pooling": "cls"}, r"--image-pooling cls: resnet18:resnet18.pth has no class token"),
        ("siglip", {"image_pooling": "cls+mean"}, r"--image-pooling cls\+mean: timm:siglip has no class token"),
        ("resnet18", {"layers": 2}, r"--layers 2: the layers of resnet18:resnet18.pth give no hidden states of one"),
        ("convnext", {"layers": 2}, r"--layers 2: the layers of timm:convnext give no hidden states of one"),
        ("registers", {"layers": 4}, r"--layers 4: timm:registers has 3 layers; use no more"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(
    kind: str, options: dict[str, Any], message: str, folders: dict[str, str]
) -> None:
    with pytest.raises((ConfigError, EncoderError), match=message) as error:
        load_encoders([image_tower(folders[kind], **options)], "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["0", "224x", "x9", "22.4", "1x2x3", "big", "-3"])
def test_a_size_is_written_in_one_way(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--image-size .*: write pixels, as in 336 or 224x448"):
        EncoderOptions(image_size=value)


def test_options_that_are_not_given_leave_the_fingerprint_as_it_was(folders: dict[str, str]) -> None:
    spec = image_tower(folders["vit"]).spec
    assert "layers" not in spec.stated
    assert image_tower(folders["vit"], image_size="160", layers="1", image_pooling="model").spec == spec
    given: list[dict[str, Any]] = [{"image_size": "96"}, {"image_pooling": "mean"}, {"layers": 2}]
    assert len({spec.fingerprint, *(image_tower(folders["vit"], **each).spec.fingerprint for each in given)}) == 4


def text_vectors(request: str, **options: Any) -> np.ndarray:
    """Vectors of a batch of texts, each checked against the library's own call."""
    asked = EncoderOptions(dtype="float32", cleaning="none", outputs=("tokens", "pooled"), **options)
    towers = describe_encoders([request], asked)
    (encoder,) = load_encoders(towers, "cpu")
    tokens, pooled = encoder.embed([encoder.prepare(text) for text in TEXTS])
    for values, tower in ((tokens, towers[0]), (pooled, towers[1])):
        reference = load_reference(tower)
        for vector, text in zip(values, TEXTS, strict=True):
            np.testing.assert_allclose(vector, reference(text), atol=1e-5)
    return np.asarray(pooled)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_layers_of_bert_are_the_mean_of_its_hidden_states(pooling: str, tiny_bert: Path) -> None:
    transformers = quiet_transformers()
    tokenizer, model = (
        getattr(transformers, kind).from_pretrained(tiny_bert) for kind in ("AutoTokenizer", "AutoModel")
    )
    found = text_vectors(f"bert:{tiny_bert}", pooling=pooling, layers="bert=2")
    for vector, text in zip(found, TEXTS, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            states = torch.stack(model(**inputs, output_hidden_states=True).hidden_states[-2:]).mean(0)[0]
        plain = {"mean": states.mean(0), "cls": states[0], "max": states.amax(0), "last": states[-1]}[pooling]
        np.testing.assert_allclose(vector, plain.numpy(), atol=1e-5)


def test_layers_of_st_come_before_its_own_pooling(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "st", tiny_bert, "cls", dense=8, normalize=True, prompts={"query": "so: "})
    asked = {"layers": "st=2", "prompt": "query"}
    found = text_vectors(f"st:{folder}", **asked)
    import sentence_transformers as st

    model = st.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    model[0].model.config.output_hidden_states = True
    states = [model[0](model.preprocess([text], prompt="so: ")) for text in TEXTS]
    for vector, features in zip(found, states, strict=True):
        features["token_embeddings"] = torch.stack(features["all_layer_embeddings"][-2:]).mean(0)
        for module in list(model)[1:]:
            features = module(features)
        np.testing.assert_allclose(vector, features["sentence_embedding"][0].detach().numpy(), atol=1e-5)
    assert np.abs(found - text_vectors(f"st:{folder}", prompt="query")).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, r"--layers 3: bert:tiny-bert has 2 layers; use no more"),
        ({"layers": 2, "pooling": "pooler"}, r"--pooling pooler is of the last layer; leave out --layers 2"),
    ],
)
def test_layers_that_bert_lacks_are_refused(options: dict[str, Any], message: str, tiny_bert: Path) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoders(
            describe_encoders([f"bert:{tiny_bert}"], EncoderOptions(dtype="float32", cleaning="none", **options)), "cpu"
        )


def test_a_tuned_tower_keeps_the_options_that_it_was_trained_with(
    folders: dict[str, str], tiny_bert: Path, tmp_path: Path
) -> None:
    st = f"st:{write_checkpoint(tmp_path / 'st', tiny_bert, prompts={'query': 'so: '})}"
    image: dict[str, Any] = {"image_size": "96x128", "image_pooling": "cls+mean"}
    for request, asked in ((folders["vit"], image), (st, {"prompt": "query", "truncate_dim": 8})):
        options = EncoderOptions(dtype="float32", cleaning="none", layers=2, **asked)
        (tower,) = describe_encoders([request], options)
        (opened,) = open_towers(tower)
        moved = dict(list(opened.module.named_parameters())[-1:])
        file = tmp_path / f"{tower.spec.family}.safetensors"
        write_delta(file, Delta(tower.request, tower.spec, "tuned"), moved)
        plain = EncoderOptions(dtype="float32", cleaning="none")
        (tuned,) = describe_encoders([f"finetuned:{file}"], plain)
        changed = {"weights": tower.spec.weights, "variant": tower.spec.variant}
        assert replace(tuned.spec, **changed) == tower.spec
        content = TEXTS[0] if tower.spec.modality == "text" else contents("image")[0]
        (encoder,) = load_encoders([tuned], "cpu")
        found = np.asarray(encoder.embed([encoder.prepare(content)])[0])[0]
        np.testing.assert_allclose(found, load_reference(tower)(content), atol=1e-5)


def test_options_of_encoders_that_are_not_there_are_dropped(folders: dict[str, str], tiny_bert: Path) -> None:
    options = EncoderOptions(layers=f"2,bert:{tiny_bert}=3,image=1", pooling="bert=cls", image_size="timm=96")
    kept = kept_for([folders["vit"]], options)
    assert (kept.layers, kept.pooling, kept.image_size) == ("2,image=1", "mean", "timm=96")
    assert kept_for([f"bert:{tiny_bert}"], options).layers == f"2,bert:{tiny_bert}=3"
