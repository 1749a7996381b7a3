"""Every layout in which encoders are handed about, made from a network whose features are known; loading it gives those features."""
import argparse
import json
import os
import re

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from safetensors.torch import save_file

from adam_nb.config import AdamError
from adam_nb.encoders import describe, load_encoder
from adam_nb.model import NORMALISATION, create_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
VIT = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8, "img_size": 32, "num_classes": 0}
SWIN = {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "img_size": 32, "num_classes": 0}


def alive(net, seed=0):
    "The network with weights and statistics that are all different, in eval mode."
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, v in (*net.named_parameters(), *net.named_buffers()):
            if v.is_floating_point() and v.ndim <= 1: v.uniform_(.5, 1.5) if name.endswith(("weight", "var", "gamma")) else v.normal_(0, .1)
    return net.eval()


def vit(**more): return alive(timm.create_model("vit_base_patch16_224", **VIT | more))
def swin(**more): return alive(timm.create_model("swin_base_patch4_window7_224", **SWIN | more))
def under(prefix, state): return {prefix + k: v for k, v in state.items()}
def noise(state): return {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}
def renamed(state, *rules):
    out = {}
    for key, value in state.items():
        for old, new in rules: key = re.sub(old, new, key)
        out[key] = value
    return out


def pooled(net, x):
    "What the source network makes of normalised images, averaged over its last map."
    if isinstance(net, torchvision.models.ResNet): return torch.nn.Sequential(*list(net.children())[:-1])(x).flatten(1)
    if isinstance(net, torchvision.models.VisionTransformer):
        tokens = torch.cat([net.class_token.expand(len(x), -1, -1), net._process_input(x)], 1)
        return net.encoder(tokens)[:, 1:].mean(1)
    if isinstance(net, torchvision.models.SwinTransformer): return net.norm(net.features(x)).mean((1, 2))
    if isinstance(net, torchvision.models.ConvNeXt): return net.features(x).mean((2, 3))
    f = net.forward_features(x)
    return f[:, net.num_prefix_tokens:].mean(1) if f.ndim == 3 else f.mean((1, 2)) if f.shape[-1] == net.num_features else f.mean((2, 3))


RESNET = alive(torchvision.models.resnet18())
PLAIN = RESNET.state_dict()
OTHER = noise(PLAIN)
NUMBERS = torch.nn.Sequential(*list(RESNET.children())[:-1]).state_dict()
TO_TRANSFORMERS = ((r"^conv1\.", "embedder.embedder.convolution."), (r"^bn1\.", "embedder.embedder.normalization."), (r"^layer(\d)\.(\d+)\.downsample\.0", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.shortcut.convolution"),
                   (r"^layer(\d)\.(\d+)\.downsample\.1", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.shortcut.normalization"),
                   (r"^layer(\d)\.(\d+)\.(conv|bn)(\d)", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.layer.{int(m[4]) - 1}.{'convolution' if m[3] == 'conv' else 'normalization'}"))
RESNETS = {
    "torchvision": PLAIN,
    "data parallel": under("module.", PLAIN),
    "smp": under("encoder.", PLAIN) | {"decoder.blocks.0.conv1.0.weight": torch.ones(2, 2, 3, 3), "segmentation_head.0.weight": torch.ones(1, 2, 3, 3)},
    "MoCo v1 and v2": {"epoch": 3, "arch": "resnet18", "state_dict": under("module.encoder_k.", OTHER) | under("module.encoder_q.", PLAIN) | {"module.queue": torch.ones(4, 8), "module.queue_ptr": torch.zeros(1)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "MoCo v3": {"state_dict": under("module.momentum_encoder.", OTHER) | under("module.base_encoder.", PLAIN) | {"module.predictor.0.weight": torch.ones(2, 2)}},
    "DINO": {"student": under("module.backbone.", OTHER), "teacher": under("backbone.", PLAIN) | {"head.mlp.0.weight": torch.ones(2, 2)}, "args": argparse.Namespace(lr=.1)},
    "DenseCL": {"state_dict": {"queue": torch.ones(8, 4), "queue2": torch.ones(8, 4)} | under("encoder_k.0.", OTHER) | under("encoder_q.0.", PLAIN) | {"encoder_q.1.mlp.0.weight": torch.ones(2, 2)}, "meta": {"epoch": 1}},
    "mmselfsup": {"meta": {"seed": 0}, "state_dict": under("backbone.", {k: v for k, v in PLAIN.items() if "fc" not in k}) | {"neck.fc0.weight": torch.ones(2, 2), "head.fc.weight": torch.ones(2, 2)}},
    "lightly": {"state_dict": under("backbone.", NUMBERS) | {"projection_head.layers.0.weight": torch.ones(2, 2)}, "pytorch-lightning_version": "2"},
    "lightly, with momentum": {"state_dict": under("backbone_momentum.", noise(NUMBERS)) | under("backbone.", NUMBERS)},
    "VICRegL": {"epoch": 1, "model": under("module.backbone.", {k: v for k, v in PLAIN.items() if "fc" not in k}) | {"module.maps_projector.0.weight": torch.ones(2, 2)}},
    "BYOL": {"online": under("net.", PLAIN), "target": under("net.", OTHER)},
    "VISSL": {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", PLAIN), "heads": {}}}}},
    "transformers": under("resnet.", renamed({k: v for k, v in PLAIN.items() if "fc" not in k}, *TO_TRANSFORMERS)),
}


def loads(tmp_path, content, source, backbone=None, channels=3, expect=None, side=32, eps=1e-4):
    path = tmp_path/"checkpoint.pth"
    torch.save(content, path)
    encoder, card = load_encoder(path, backbone, verbose=False)
    assert card["report"]["missing"] == 0, describe(card)
    if expect: assert encoder.backbone == expect
    torch.manual_seed(1)
    x = torch.rand(2, channels, side, side)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in NORMALISATION[channels])
    with torch.no_grad(): truth, got = pooled(source, (x - mean)/std), encoder(x)
    assert truth.std() > .01
    torch.testing.assert_close(got, truth, rtol=eps, atol=eps*max(1, truth.std()))       # deep networks with made-up weights give features of millions, and a few near 0 among them
    return card


@pytest.mark.parametrize("layout", RESNETS)
def test_resnet_layouts(layout, tmp_path):
    card = loads(tmp_path, RESNETS[layout], RESNET, expect="resnet18", side=64)
    assert "Normalisation not in the file" in describe(card)


def test_timm_resnet_and_its_numbers(tmp_path):
    net = alive(timm.create_model("resnet18", in_chans=1))
    card = loads(tmp_path, net.state_dict(), net, channels=1, expect="resnet18", side=64)
    assert card["report"]["unexpected_names"] == ["fc.weight", "fc.bias"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101"])
def test_deeper_resnets(name, tmp_path):
    net = alive(getattr(torchvision.models, name)())
    loads(tmp_path, {"model": under("module.", net.state_dict())}, net, expect=name, side=64)
    net = smp.Unet(name, encoder_weights=None, in_channels=1)
    torch.save(net.state_dict(), tmp_path/"unet.pth")
    encoder, card = load_encoder(tmp_path/"unet.pth", verbose=False)
    assert (encoder.backbone, encoder.in_channels, card["report"]["prefix"], card["report"]["missing"]) == (name, 1, "encoder.", 0)


# ---------------------------------------------------------------- transformers

TINY = "timm:vit_base_patch16_224?embed_dim=64&depth=2&patch_size=8&img_size=32&num_heads=1"
MAE = {"mask_token": torch.ones(1, 1, 32), "decoder_embed.weight": torch.ones(32, 64), "decoder_pos_embed": torch.ones(1, 17, 32), "decoder_blocks.0.attn.qkv.weight": torch.ones(96, 32), "decoder_norm.weight": torch.ones(32), "decoder_pred.weight": torch.ones(192, 32)}
OPENMM_VIT = ((r"^blocks\.(\d+)\.norm(\d)", r"layers.\1.ln\2"), (r"^blocks\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"), (r"^blocks\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"),
              (r"^blocks\.", "layers."), (r"^norm\.", "ln1."), (r"patch_embed\.proj", "patch_embed.projection"))
TRANSFORMERS_VIT = ((r"^cls_token", "embeddings.cls_token"), (r"^pos_embed", "embeddings.position_embeddings"), (r"^reg_token", "embeddings.register_tokens"), (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^norm\.", "layernorm."),
                    (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.output.dense"))


def transformers_vit(net, dino=False):
    inner = (("norm1", "norm1" if dino else "layernorm_before"), ("norm2", "norm2" if dino else "layernorm_after"), *([] if dino else [(r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense")]), (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"))
    state, out = renamed(net.state_dict(), *TRANSFORMERS_VIT, *((rf"^blocks\.(\d+)\.{old}", rf"encoder.layer.\1.{new.replace(chr(92) + '1', chr(92) + '2')}") for old, new in inner)), {}
    for key, value in state.items():
        if m := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
            for part, v in zip(("query", "key", "value"), value.chunk(3)): out[f"encoder.layer.{m[1]}.attention.attention.{part}.{m[2]}"] = v
        else: out[key] = value
    return out


@pytest.mark.parametrize("layout", ["timm", "DINO", "MAE", "lightly MAE", "MoCo v3", "mmselfsup", "transformers", "transformers MAE"])
def test_vit_layouts(layout, tmp_path):
    net = vit(); s = net.state_dict()
    content = {"timm": s | {"head.weight": torch.ones(5, 64)}, "DINO": {"student": under("module.backbone.", noise(s)), "teacher": under("backbone.", s) | {"head.last_layer.weight_g": torch.ones(2, 1)}},
               "MAE": {"model": s | MAE, "optimizer": {}, "epoch": 1, "args": argparse.Namespace(model="mae")}, "lightly MAE": {"state_dict": under("backbone.vit.", s) | under("decoder.", {"mask_token": torch.ones(1, 1, 32)})},
               "MoCo v3": {"state_dict": under("module.momentum_encoder.", noise(s)) | under("module.base_encoder.", s) | {"module.base_encoder.head.0.weight": torch.ones(4, 64)}},
               "mmselfsup": {"meta": {}, "state_dict": under("backbone.", renamed(s, *OPENMM_VIT)) | {"backbone.mask_token": torch.ones(1, 1, 64), "neck.decoder_embed.weight": torch.ones(2, 2)}},
               "transformers": transformers_vit(net) | {"pooler.dense.weight": torch.ones(64, 64)}, "transformers MAE": under("vit.", transformers_vit(net)) | {"decoder.mask_token": torch.ones(1, 1, 32)}}[layout]
    card = loads(tmp_path, content, net, expect=TINY)
    assert "Attention heads assumed: 1" in describe(card)


def test_torchvision_vit(tmp_path):
    net = alive(torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=1, hidden_dim=64, mlp_dim=256))
    loads(tmp_path, net.state_dict(), net, expect=TINY)


def test_moco_v3_small_has_twelve_heads(tmp_path):
    net = alive(timm.create_model("vit_small_patch16_224", num_heads=12, depth=12, num_classes=0, img_size=32, dynamic_img_size=True))
    card = loads(tmp_path, {"state_dict": under("module.base_encoder.", net.state_dict())}, net, expect="timm:vit_small_patch16_224?img_size=32&num_heads=12")
    assert "Attention heads assumed: 12, as MoCo v3's" in describe(card)


@pytest.mark.parametrize("layout", ["own", "in chunks", "transformers"])
@pytest.mark.parametrize("registers", [0, 4])
def test_dino_v2(layout, registers, tmp_path):
    net = vit(init_values=1e-5, reg_tokens=registers, no_embed_class=bool(registers)); s = net.state_dict()
    if registers:       # as DINOv2 writes it: the class token has a position, the registers have none
        place = torch.randn(1, 1, 64)
        s = s | {"cls_token": s["cls_token"] - place, "pos_embed": torch.cat([place, s["pos_embed"]], 1)}
        s["register_tokens"] = s.pop("reg_token")
    if layout == "transformers":
        named = type("Named", (), {"state_dict": lambda self: {k.replace("register_tokens", "reg_token"): v for k, v in s.items()}})()
        content = transformers_vit(named, dino=True) | {"embeddings.mask_token": torch.ones(1, 64)}
    else: content = {"teacher": under("backbone.", (renamed(s, (r"^blocks\.(\d+)", r"blocks.0.\1")) if layout == "in chunks" else s) | {"mask_token": torch.ones(1, 64)})}
    loads(tmp_path, content, net)


def original_swin(state, depth=2):
    "As the Swin repository and SimMIM write it: merging at the end of a stage, with index and mask."
    out = renamed(state, (r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"))
    for i in range(depth): out |= {f"layers.{i}.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64), f"layers.{i}.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    return out


OPENMM_SWIN = ((r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) - 1}.downsample"), (r"^layers\.", "stages."), (r"\.attn\.", ".attn.w_msa."), (r"mlp\.fc1", "ffn.layers.0.0"), (r"mlp\.fc2", "ffn.layers.1"), (r"^norm\.", "norm3."), (r"patch_embed\.proj\.", "patch_embed.projection."))


@pytest.mark.parametrize("layout", ["timm", "original", "SimMIM", "mmselfsup"])
def test_swin_layouts(layout, tmp_path):
    net = swin(); s = net.state_dict()
    mm = renamed(s, *OPENMM_SWIN)
    for k in mm:
        if "downsample" in k: mm[k] = torch.stack([mm[k][..., [j*c + i for j in (0, 2, 1, 3)]] for c in [mm[k].shape[-1]//4] for i in range(c)], -2).flatten(-2)      # channel, row, column
    content = {"timm": s, "original": {"model": original_swin(s) | {"head.weight": torch.ones(5, 64)}}, "SimMIM": {"model": under("encoder.", original_swin(s)) | {"encoder.mask_token": torch.ones(1, 1, 32), "decoder.0.weight": torch.ones(2, 2, 1, 1)}},
               "mmselfsup": {"state_dict": under("backbone.", mm)}}[layout]
    loads(tmp_path, content, net)


def test_openmm_merges_by_unfolding():
    "The order of the four merged pixels, from an unfolding written out, against timm's merging."
    from adam_nb.foreign import _openmm_swin
    torch.manual_seed(0)
    x, weight, norm, bias = torch.randn(2, 6, 4, 8), torch.randn(16, 32), torch.rand(32) + .5, torch.randn(32)
    u = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    truth = torch.nn.functional.linear(torch.nn.functional.layer_norm(u, (32,), norm, bias), weight).unflatten(1, (3, 2))
    ours = _openmm_swin({"stages.0.downsample.reduction.weight": weight, "stages.0.downsample.norm.weight": norm, "stages.0.downsample.norm.bias": bias})
    merging = timm.models.swin_transformer.PatchMerging(8, 16)
    merging.load_state_dict({k.removeprefix("layers.1.downsample."): v for k, v in ours.items()})
    with torch.no_grad(): torch.testing.assert_close(merging(x), truth, rtol=1e-5, atol=1e-5)


def test_torchvision_swin(tmp_path):
    net = alive(torchvision.models.SwinTransformer(patch_size=[4, 4], embed_dim=32, depths=[2, 2], num_heads=[1, 2], window_size=[4, 4]))
    loads(tmp_path, net.state_dict(), net)


# ---------------------------------------------------------------- convolutional networks of timm

def test_convnext_of_vicregl(tmp_path):
    net = alive(timm.create_model("convnext_atto", num_classes=0)); s = net.state_dict()
    original = renamed(s, (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."), (r"\.blocks\.", "."), (r"conv_dw", "dwconv"), (r"mlp\.fc1", "pwconv1"), (r"mlp\.fc2", "pwconv2"), (r"^head\.norm", "norm"))
    loads(tmp_path, {"model": under("module.backbone.", original)}, net, expect="timm:convnext_atto", side=64)
    loads(tmp_path, s, net, expect="timm:convnext_atto", side=64)


def test_convnext_of_torchvision(tmp_path):
    net = alive(torchvision.models.convnext_tiny())
    with torch.no_grad():
        for name, v in net.named_parameters():
            if name.endswith("layer_scale"): v.uniform_(.2, .5)         # as it begins, a block adds next to nothing, and its faults would not be seen
    loads(tmp_path, net.state_dict(), net, expect="timm:convnext_tiny", side=64)
    loads(tmp_path, under("module.encoder_q.", net.state_dict()), net, "convnext_tiny", side=64)
    assert create_encoder("convnext_tiny", 1, seed=0).backbone == "timm:convnext_tiny"


def test_densenet_of_torchvision(tmp_path):
    net = alive(torchvision.models.densenet121())
    torch.save({"state_dict": under("module.", net.state_dict())}, tmp_path/"d.pth")
    encoder, card = load_encoder(tmp_path/"d.pth", verbose=False)
    assert (encoder.backbone, card["report"]["missing"], card["report"]["unexpected"]) == ("timm:densenet121", 0, 2)
    x = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in NORMALISATION[3])
    with torch.no_grad(): torch.testing.assert_close(encoder(x), net.features((x - mean)/std).relu().mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_safetensors(tmp_path):
    save_file(under("backbone.", {k: v.contiguous() for k, v in PLAIN.items()}), tmp_path/"model.safetensors")
    encoder, card = load_encoder(tmp_path/"model.safetensors", verbose=False)
    assert (encoder.backbone, card["report"]["prefix"], card["report"]["missing"]) == ("resnet18", "backbone.", 0)


@pytest.mark.parametrize("name, content", [("config.json", {"architecture": "resnet18", "pretrained_cfg": {"mean": [.53]*3, "std": [.26]*3}}), ("preprocessor_config.json", {"image_mean": [.53]*3, "image_std": [.26]*3})])
def test_normalisation_of_model_folders(name, content, tmp_path):
    save_file({k: v.contiguous() for k, v in PLAIN.items()}, tmp_path/"model.safetensors")
    (tmp_path/name).write_text(json.dumps(content))
    encoder, card = load_encoder(tmp_path/"model.safetensors", verbose=False)
    assert (card["mean"], card["std"]) == ([.53]*3, [.26]*3) and f"Normalisation from the {name} beside it" in describe(card)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([.53]*3))
    assert load_encoder(tmp_path/"model.safetensors", mean=[.1]*3, std=[.2]*3, verbose=False)[1]["mean"] == [.1]*3
    (tmp_path/name).write_text("{")
    with pytest.raises(AdamError, match="no valid JSON"): load_encoder(tmp_path/"model.safetensors", verbose=False)


# ---------------------------------------------------------------- refusals, and what is said

def refused(tmp_path, content, *words, backbone=None):
    torch.save(content, tmp_path/"refused.pth")
    with pytest.raises(AdamError) as e: load_encoder(tmp_path/"refused.pth", backbone)
    for w in ("refused.pth", *words): assert w in str(e.value), (w, str(e.value))


def test_refusals(tmp_path):
    s = vit().state_dict()
    refused(tmp_path, s, "position embedding", "img_size", backbone=TINY.replace("img_size=32", "img_size=64"))
    refused(tmp_path, {k: v for k, v in s.items() if ".mlp." not in k}, "missing or have another shape", "mlp", backbone=TINY)
    refused(tmp_path, PLAIN, "looks like a resnet18 checkpoint, you asked for timm:vit", backbone=TINY)
    refused(tmp_path, s, "looks like a timm:vit", "you asked for resnet18", backbone="resnet18")
    refused(tmp_path, swin().state_dict(), "you asked for resnet50", "swin", backbone="resnet50")
    refused(tmp_path, {k: v for k, v in s.items() if k != "pos_embed"}, "a ViT", "name it")
    refused(tmp_path, s | {"pos_embed": torch.ones(1, 19, 64)}, "a ViT", "name it")
    refused(tmp_path, timm.create_model("resnet18d").state_dict(), "a ResNet", "name it")                       # another stem
    refused(tmp_path, timm.create_model("resnet18d").state_dict(), "conv1.weight", backbone="resnet18")
    refused(tmp_path, {"w": torch.ones(2)}, "none of resnet18")
    refused(tmp_path, {"model": {"epoch": 1}}, "no named tensors")
    refused(tmp_path, s | {"norm.weight": torch.full((64,), torch.nan)}, "NaN", "norm.weight")


def test_no_code_runs(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path/'owned'}",)
    refused(tmp_path, {"model": PLAIN, "extra": Evil()}, "can run code")
    assert not (tmp_path/"owned").exists()


def test_what_a_framework_leaves_beside_the_weights(tmp_path, monkeypatch):
    "As mmengine writes it: a history object with an array and with methods of its class, which are never built or called."
    import sys
    import types
    import numpy as np
    module = types.ModuleType("mmengine.logging.history_buffer")
    class HistoryBuffer:
        called = []
        def mean(self): self.called.append(1)
        def __setstate__(self, state): self.called.append(2)
    HistoryBuffer.__module__, HistoryBuffer.__qualname__, HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer", "mmengine.logging.history_buffer", "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"): monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    history = HistoryBuffer(); history.values, history.methods = np.arange(3.), {"mean": HistoryBuffer.mean}
    torch.save({"state_dict": under("backbone.", PLAIN), "message_hub": {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": 3}}, "meta": {"time": "x"}}, tmp_path/"mm.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__): monkeypatch.delitem(sys.modules, name)
    encoder, card = load_encoder(tmp_path/"mm.pth", verbose=False)
    assert (encoder.backbone, card["report"]["missing"], HistoryBuffer.called) == ("resnet18", 0, [])


def test_the_report_is_printed_for_foreign_files(tmp_path, capsys):
    torch.save({"state_dict": under("module.encoder_q.", PLAIN) | {"module.queue": torch.ones(4)}}, tmp_path/"moco.pth")
    load_encoder(tmp_path/"moco.pth")
    said = capsys.readouterr().out
    assert said.startswith("moco.pth: resnet18 in 'state_dict' under 'module.encoder_q.': 120 tensors matched, missing 0, unexpected 2 (fc.weight, fc.bias), 1 outside.") and "normalisation not in the file" in said.lower(), said
    _, card = load_encoder(tmp_path/"moco.pth", mean=[.5]*3, std=[.25]*3, verbose=False)
    assert card["mean"] == [.5]*3 and "ormalisation" not in describe(card)


def test_one_grey_channel(tmp_path):
    net = vit(); torch.save(net.state_dict(), tmp_path/"v.pth")
    three, _ = load_encoder(tmp_path/"v.pth", verbose=False, mean=[.5]*3, std=[.25]*3)
    one, card = load_encoder(tmp_path/"v.pth", in_channels=1, verbose=False, mean=[.5], std=[.25])
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(one(x), three(x), rtol=1e-4, atol=1e-5)
    assert "summed to 1" in describe(card)


# ---------------------------------------------------------------- exports

def card_features(folder, images):
    "The features that the code of an exported model card gives, run as it stands there."
    code = re.search(r"```python\n(.*?)```", (folder/"README.md").read_text(), re.S)[1].replace('folder = "."', f"folder = {str(folder)!r}")
    names = {"images": images}
    with torch.no_grad(): exec(code, names)
    return names["features"]


@pytest.mark.parametrize("layout", ["torchvision", "timm", "smp", "safetensors"])
@pytest.mark.parametrize("channels", [1, 3])
def test_exports_load_in_their_library(layout, channels, tmp_path):
    from adam_nb.encoders import save_encoder
    from adam_nb.export import export
    from adam_nb.model import create_encoder
    encoder = create_encoder("resnet18", channels, seed=0, mean=[.4]*channels, std=[.3]*channels).eval()
    alive(encoder.body)
    save_encoder(tmp_path/"e.safetensors", encoder, {"arm": "adam", "view_size": 64})
    x = torch.rand(2, channels, 64, 64)
    files = export(tmp_path/"e.safetensors", tmp_path/"out", layout)
    with torch.no_grad(): truth = encoder(x)
    torch.testing.assert_close(card_features(tmp_path/"out", x), truth, rtol=1e-4, atol=1e-4)
    back, card = load_encoder(files[0])
    assert (card["mean"], card["std"], card["arm"], card["report"]["missing"], card["report"]["assumed"]) == ([.4]*channels, [.3]*channels, "adam", 0, [])
    with torch.no_grad(): torch.testing.assert_close(back(x), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", [TINY, "timm:swin_base_patch4_window7_224?embed_dim=32&depths=(2,2)&num_heads=(1,2)&window_size=4&img_size=32", "timm:convnext_atto"])
def test_exports_of_timm_networks(backbone, tmp_path):
    from adam_nb.encoders import save_encoder
    from adam_nb.export import export
    from adam_nb.model import create_encoder
    encoder = create_encoder(backbone, 1, seed=0).eval()
    alive(encoder.body)
    save_encoder(tmp_path/"e.safetensors", encoder, {"arm": "adam"})
    x = torch.rand(2, 1, 64, 64)
    files = export(tmp_path/"e.safetensors", tmp_path/"out", "timm")
    with torch.no_grad(): truth = encoder(x)
    torch.testing.assert_close(card_features(tmp_path/"out", x), truth, rtol=1e-4, atol=1e-4)
    with torch.no_grad(): torch.testing.assert_close(load_encoder(files[0])[0](x), truth, rtol=1e-5, atol=1e-5)
    for layout in ("torchvision", "smp"):
        with pytest.raises(AdamError, match="use layout timm or safetensors"): export(tmp_path/"e.safetensors", tmp_path/"no", layout)
    assert not (tmp_path/"no").exists()


# ---------------------------------------------------------------- transformers at work

@pytest.mark.parametrize("source", [vit, swin])
def test_transformers_classify_and_are_probed(source, tmp_path):
    "A ViT or a Swin from a foreign file takes a step of fine-tuning and gives embeddings and dense maps, of grey films too."
    from adam_nb.classify import Classifier
    from adam_nb.eve import Eve
    torch.save({"model": source().state_dict()}, tmp_path/"t.pth")
    encoder, _ = load_encoder(tmp_path/"t.pth", verbose=False)
    model = Classifier(encoder.train(), 2)
    x = torch.rand(4, 1, 64, 64)
    before = model.encoder.body.patch_embed.proj.weight.clone()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    model(x).square().sum().backward(); optimiser.step()
    assert (model.encoder.body.patch_embed.proj.weight != before).any()
    eve = Eve.load(tmp_path/"t.pth", device="cpu")
    assert eve.embed(x).shape == (4, eve.dim) and torch.isfinite(eve.embed(x)).all()
    image = x[0, 0].numpy()
    for method in ("forward", "patches"): assert eve.dense(image, (2, 2), method=method, level=0).shape == (2, 2, eve.dim)
    eve.save(tmp_path/"ours.safetensors")
    again = Eve.load(tmp_path/"ours.safetensors", device="cpu")
    assert again.encoder.backbone == eve.encoder.backbone and torch.equal(again.embed(x), eve.embed(x))


def test_a_size_that_is_no_multiple_of_the_patch(tmp_path):
    torch.save(vit().state_dict(), tmp_path/"v.pth")
    encoder, _ = load_encoder(tmp_path/"v.pth", verbose=False)
    with pytest.raises(AdamError, match="patches of 8 × 8 pixels, and 60 × 64"): encoder(torch.rand(1, 3, 60, 64))
