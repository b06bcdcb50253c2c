"""One architecture of (nearly) every model family in timm, with random weights and small images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from check import BATCH, Case

# name -> side of the images, then arguments that make the architecture smaller. The side is given
# to the model too where timm fixes it at construction.
ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    "lambda_resnet26t": (64, {}),
    "test_byobnet": (64, {}),
    "cait_xxs24_224": (32, {"depth": 2}),
    "coat_tiny": (32, {}),
    "convit_tiny": (32, {"depth": 3, "local_up_to_layer": 2}),
    "convmixer_768_32": (28, {}),
    "convnext_zepto_rms": (32, {}),
    "convnextv2_atto": (32, {"depths": (1, 1, 2, 1)}),
    "cpubone_nano": (64, {}),
    "crossvit_tiny_240": (240, {"depth": ((1, 2, 0), (1, 2, 0))}),
    "csatv2": (256, {}),
    "cs3darknet_focus_s": (64, {}),
    "cspnext_tiny": (64, {}),
    "davit_tiny": (56, {"depths": (1, 1, 2, 1), "embed_dims": (24, 48, 96, 192)}),
    "deepseek_vit_412m": (28, {"depth": 2, "embed_dim": 128, "num_heads": 4}),
    "deit_tiny_distilled_patch16_224": (32, {"depth": 2}),
    "densenet121": (32, {"block_config": (2, 2, 2, 2)}),
    "dla46x_c": (64, {}),
    "dpn48b": (32, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (64, {}),
    "efficientnet_b0": (32, {}),
    "tf_efficientnetv2_b0": (32, {}),
    "efficientvim_m1": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {}),
    "eva02_tiny_patch14_224": (28, {"depth": 2}),
    "fasternet_t0": (32, {}),
    "fastvit_t8": (64, {}),
    "focalnet_tiny_srf": (32, {}),
    "gcvit_xxtiny": (64, {}),
    "gemma4_vit_167m": (48, {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    "ghostnet_050": (32, {}),
    "hardcorenas_b": (32, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (64, {}),
    "sam2_hiera_tiny": (64, {}),
    "hrnet_w18_small": (64, {}),
    "iformer_t": (64, {}),
    "inception_next_atto": (64, {}),
    "inception_resnet_v2": (96, {}),
    "inception_v3": (96, {}),
    "inception_v4": (96, {}),
    "lcnetv2_small": (64, {}),
    "levit_128s": (64, {}),
    "lowformer_b0": (64, {}),
    "test_mambaout": (64, {}),
    "maxvit_pico_rw_256": (64, {}),
    "coatnet_nano_rw_224": (64, {}),
    "maxxvit_rmlp_nano_rw_256": (64, {}),
    "poolformer_s12": (32, {}),
    "caformer_s18": (64, {}),
    "gmlp_ti16_224": (32, {}),
    "resmlp_12_224": (32, {}),
    "mixer_s32_224": (64, {}),
    "mobilenetv3_small_050": (32, {}),
    "mobilenetv4_conv_small": (32, {}),
    "mobilenetv5_base": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (64, {}),
    "naflexvit_base_patch16_parfac_gap": (32, {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    "nasnetalarge": (64, {}),
    "nest_tiny": (64, {}),
    "nextvit_small": (64, {}),
    "test_nfnet": (64, {}),
    "nf_regnet_b0": (64, {}),
    "pit_ti_224": (64, {}),
    "pnasnet5large": (96, {}),
    "pvt_v2_b0": (64, {}),
    "qwen3_vit_88m": (64, {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    "rdnet_tiny": (64, {}),
    "regnety_002": (64, {}),
    "repghostnet_050": (64, {}),
    "repvit_m1": (64, {}),
    "res2next50": (32, {"layers": (1, 1, 1, 1)}),
    "resnest14d": (64, {}),
    "test_resnet": (64, {}),
    "resnet18d": (64, {}),
    "resnetv2_18": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42": (64, {}),
    "legacy_seresnet18": (64, {}),
    "sequencer2d_s": (64, {"embed_dims": (24, 48, 48, 48), "hidden_sizes": (6, 12, 12, 12)}),
    "shvit_s1": (128, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {}),
    "swin_tiny_patch4_window7_224": (56, {"depths": (2, 2), "embed_dim": 24, "num_heads": (3, 6)}),
    "swinv2_tiny_window16_256": (64, {"depths": (2, 2), "embed_dim": 24, "num_heads": (3, 6)}),
    "swinv2_cr_tiny_224": (64, {"depths": (2, 2), "embed_dim": 24, "num_heads": (3, 6)}),
    "tiny_vit_5m_224": (64, {}),
    "tnt_s_legacy_patch16_224": (32, {"depth": 2}),
    "tresnet_m": (64, {}),
    "twins_svt_small": (64, {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128)}),
    "twins_pcpvt_small": (64, {"depths": (1, 1, 2, 1)}),
    "vgg11": (32, {}),
    "visformer_tiny": (64, {}),
    "test_vit": (32, {}),
    "vit_medium_patch16_reg4_gap_256": (32, {"depth": 2}),
    "vit_tiny_r_s16_p8_224": (64, {"depth": 2}),
    "test_vit_relpos": (32, {}),
    "samvit_base_patch16_224": (
        32,
        {"depth": 2, "embed_dim": 96, "num_heads": 3, "global_attn_indexes": (1,)},
    ),
    "vitamin_small_224": (32, {}),
    "volo_d1_224": (64, {"layers": (1, 1, 1, 1)}),
    "ese_vovnet19b_slim_dw": (64, {}),
    "legacy_xception": (64, {}),
    "xception41p": (64, {}),
    "xcit_nano_12_p8_224": (32, {"depth": 2}),
}


def _make(name: str, side: int, smaller: dict[str, Any]) -> Case:
    import timm

    fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
    size = {"img_size": side} if fixed else {}
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **size, **smaller)

    def inputs(generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (BATCH, 3, side, side)
        return (torch.randn(shape, generator=generator, dtype=torch.float64),), {}

    return Case(model, inputs)


CASES: dict[str, Callable[[], Case]] = {
    name: functools.partial(_make, name, side, smaller)
    for name, (side, smaller) in ARCHITECTURES.items()
}
