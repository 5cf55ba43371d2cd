"""DINOv2 out of `transformers`' files and out of ONNX exports: our tower gives its numbers."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from emollama_jax import imported
from emollama_jax.errors import UserError
from tests.helpers.torch_models import (
    assert_same,
    convert,
    leaves,
    randomise,
    run_tower,
    sized,
    torch,
)
from tools.convert_torch.dinov2 import IMAGE_MEAN, IMAGE_STD, open_dinov2
from tools.convert_torch.export import export as export_ours

SMALL = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    mlp_ratio=2,
    patch_size=7,
    image_size=35,  # 5 × 5 positions
    layer_norm_eps=1e-5,
)
OTHER = dict(SMALL, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, mlp_ratio=3)


def dinov2(kind=Dinov2Model, **settings):
    """A DINOv2 whose LayerScale, biases and positions all show, in float32."""
    config = Dinov2WithRegistersConfig if "Registers" in kind.__name__ else Dinov2Config
    model = randomise(kind(config(**{**SMALL, **settings})), 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lambda1"):
                parameter.mul_(3).add_(0.5)  # around 0.5, some below 0
    return model


def fitting(settings, *, image_size):
    """A model's config whose tower is a DINOv2 of some settings."""
    vision = dict(
        image_size=image_size,
        patch_size=settings["patch_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        mlp_width=settings["hidden_size"] * settings["mlp_ratio"],
        norm_eps=settings["layer_norm_eps"],
        last_norm=True,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return sized(vision=vision, qformer=dict(encoder_width=settings["hidden_size"]))


def export(model, path, *, size, **options):
    """An ONNX file as PyTorch's own exporter writes it, with a batch of any size."""
    pixels = torch.zeros(1, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing
        torch.onnx.export(
            model,
            (pixels,),
            path,
            dynamo=False,
            input_names=["pixel_values"],
            output_names=["hidden"],
            dynamic_axes={"pixel_values": {0: "batch"}},
            **options,
        )


def pictures(size):
    return np.random.default_rng(2).standard_normal((2, 3, size, size), dtype=np.float32)


def close(got, wanted):
    assert np.abs(got - wanted).max() < 5e-5 * np.abs(wanted).max()


def last_hidden_state(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x)).last_hidden_state.numpy()


def refused(path, out, source="dinov2"):
    with pytest.raises(UserError) as error:
        convert(source, path, out)
    assert not out.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "size"), [(SMALL, 28), (SMALL, 49), (OTHER, 35)], ids=["smaller", "larger", "same"]
)
def test_the_tower_is_that_of_transformers(tmp_path, settings, size):
    model = dinov2(**settings)
    model.save_pretrained(tmp_path / "theirs")
    # The sizes are the file's, whatever the config says; the picture's side is the config's.
    start = sized(vision=dict(image_size=size, depth=1, last_norm=False, norm_eps=0.1))
    convert("dinov2", tmp_path / "theirs", tmp_path / "ours", start)
    wanted = fitting(settings, image_size=size)
    imported.check_base(
        [tmp_path / "ours"],
        wanted,
        {path: leaf.shape for path, leaf in leaves(tmp_path / "ours").items()},
    )
    x = pictures(size)
    close(run_tower(tmp_path / "ours", wanted.vision, x), last_hidden_state(model, x))
    said = " ".join(imported.read_manifest(tmp_path / "ours").notes)
    assert "bias of k" in said and "last_norm: true" in said
    assert ("interpolated from 5 × 5" in said) == (size != 35)


def test_what_it_does_not_fit_refuses_it(tmp_path):
    dinov2().save_pretrained(tmp_path / "theirs")
    right = fitting(SMALL, image_size=28)
    convert("dinov2", tmp_path / "theirs", tmp_path / "ours", right)
    for to in ("eva-vit", "llama-vid"):
        with pytest.raises(UserError, match="ends in a norm, as DINOv2's"):
            export_ours(
                to,
                tmp_path / "ours",
                tmp_path / "back",
                base=(),
                merge=True,
                dtype="source",
                shard_gb=1,
                console=Console(quiet=True),
            )
    shapes = {path: leaf.shape for path, leaf in leaves(tmp_path / "ours").items()}
    for field, value in (
        ("last_norm", False),
        ("image_mean", (0.5, 0.5, 0.5)),
        ("image_std", (0.5, 0.5, 0.5)),
        ("heads", 6),
    ):
        vision = dataclasses.replace(right.vision, **{field: value})
        with pytest.raises(UserError, match=rf"model\.vision\.{field}"):
            imported.check_base(
                [tmp_path / "ours"], dataclasses.replace(right, vision=vision), shapes
            )


def test_onnx_holds_the_same_tower(tmp_path):
    """Kernels have no names there and are transposed; equal vectors are one, under many names."""
    plain = Dinov2Model(Dinov2Config(**SMALL)).eval()  # zero biases, ones for norms and LayerScale
    for name, model in (("plain", plain), ("random", dinov2())):
        folder = tmp_path / name
        model.save_pretrained(folder / "theirs")
        export(model, folder / "model.onnx", size=28)
        cfg = fitting(SMALL, image_size=28)
        convert("dinov2", folder / "theirs", folder / "ours", cfg)
        convert("dinov2", folder / "model.onnx", folder / "onnx", cfg)
        assert_same(folder / "ours", folder / "onnx")


def test_kernels_are_found_by_the_graph(tmp_path):
    """Neither the order of an ONNX file's constants nor their made-up names matter."""
    onnx = pytest.importorskip("onnx", reason="reads and writes ONNX files")
    model = torch.nn.Sequential()
    model.backbone = dinov2()
    model.forward = lambda x: model.backbone(x).last_hidden_state.mean(1) @ torch.ones(24, 2)
    export(model, tmp_path / "model.onnx", size=35, opset_version=17)
    file = onnx.load(tmp_path / "model.onnx")
    rng, names = np.random.default_rng(0), {}
    tensors = list(file.graph.initializer)
    for tensor in tensors:
        if tensor.name.startswith("onnx::"):
            names[tensor.name] = tensor.name = f"t{rng.integers(1 << 30)}"
    del file.graph.initializer[:]
    file.graph.initializer.extend([tensors[i] for i in rng.permutation(len(tensors))])
    for node in file.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    onnx.save(file, tmp_path / "model.onnx")
    model.backbone.save_pretrained(tmp_path / "theirs")
    cfg = fitting(SMALL, image_size=35)
    convert("dinov2", tmp_path / "theirs", tmp_path / "ours", cfg)
    convert("dinov2", tmp_path / "model.onnx", tmp_path / "onnx", cfg)
    assert_same(tmp_path / "ours", tmp_path / "onnx")


def test_a_classifier_and_the_names_in_memory(tmp_path):
    """`transformers` 5 calls its modules otherwise than its files; a head is left out."""
    model = dinov2(Dinov2ForImageClassification)
    model.save_pretrained(tmp_path / "theirs")
    cfg = fitting(SMALL, image_size=28)
    convert("dinov2", tmp_path / "theirs", tmp_path / "ours", cfg)
    assert "left out 2 tensors: not of the backbone" in " ".join(
        imported.read_manifest(tmp_path / "ours").notes
    )
    memory = tmp_path / "memory"
    memory.mkdir()
    torch.save(model.dinov2.state_dict(), memory / "pytorch_model.bin")
    (memory / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    convert("dinov2", memory, tmp_path / "more", cfg)
    assert_same(tmp_path / "ours", tmp_path / "more")


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["folder", "onnx"])
def test_siblings_are_refused_by_name(tmp_path, file):
    siblings = {
        "register tokens": dinov2(Dinov2WithRegistersModel),
        "SwiGLU": dinov2(use_swiglu_ffn=True),
    }
    for what, model in siblings.items():
        path = tmp_path / what.replace(" ", "_")
        if file == "onnx":
            path.mkdir()
            path = path / "model.onnx"
            # Its exporter has no antialiased interpolation, which those with registers do.
            whole = model.embeddings.position_embeddings
            model.embeddings.interpolate_pos_encoding = lambda *_, whole=whole: whole
            export(model, path, size=35)
        else:
            model.save_pretrained(path)
        assert what in refused(path, tmp_path / "ours")


def test_settings_that_change_a_number_are_refused(tmp_path):
    folder = tmp_path / "theirs"
    dinov2().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    for changed, message in (
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', wanted 'gelu'"),
        ({"model_type": "vit"}, "model_type is 'vit', wanted 'dinov2'"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, wanted a divisor"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_hidden_layers": 2}, "no row of the table reads it"),
        ({"num_hidden_layers": 4}, "missing"),
    ):
        (folder / "config.json").write_text(json.dumps({**settings, **changed}))
        with pytest.raises(UserError, match=message):
            convert("dinov2", folder, tmp_path / "ours")
    (folder / "config.json").unlink()
    assert "no config.json beside the weights" in refused(folder, tmp_path / "ours")


def test_a_tensor_that_is_missing_is_named(tmp_path):
    folder = tmp_path / "theirs"
    dinov2().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.layer_scale2.lambda1"]
    save_file(tensors, folder / "model.safetensors")
    assert "encoder.layer.1.layer_scale2.lambda1: missing" in refused(folder, tmp_path / "ours")


def test_onnx_files_that_cannot_be_read(tmp_path):
    onnx = pytest.importorskip("onnx", reason="reads and writes ONNX files")
    path = tmp_path / "model.onnx"
    export(dinov2(), path, size=28)
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04 no", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "not a complete ONNX file" in refused(path, tmp_path / "ours")
    file = onnx.load_from_string(whole)
    for node in file.graph.node:  # as a quantized export has it
        if node.op_type == "MatMul":
            node.op_type = "MatMulInteger"
    onnx.save(file, path)
    assert "wanted the product with its kernel" in refused(path, tmp_path / "ours")
    path.write_bytes(whole)
    assert "wanted only one ONNX file" in str(open_dinov2([path, path]).problems)
    assert "no such file" in refused(tmp_path / "absent.onnx", tmp_path / "ours")
    assert "dinov2" in refused(path, tmp_path / "ours", source="eva-vit")
