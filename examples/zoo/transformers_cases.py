"""Hugging Face architectures from tiny configurations: vision, text, audio, encoders, decoders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from check import BATCH, Case

SIDE, LENGTH, WORDS = 32, 10, 50

_TEXT = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
_DECODER = {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
_SEQ2SEQ = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {
    "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "num_decoder_layers": 2, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
_PYRAMID = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_WINDOWS = {
    "image_size": SIDE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
_AUDIO = {
    **_TEXT, "conv_dim": [16, 16], "conv_kernel": [4, 3], "conv_stride": [3, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip

# name -> (kind of inputs, arguments of its configuration, class where it is not {name}Model)
ARCHITECTURES: dict[str, tuple[Any, ...]] = {
    # vision
    "ViT": ("pixels", _VISION),
    "DeiT": ("pixels", _VISION),
    "Beit": ("pixels", {**_VISION, "use_relative_position_bias": True}),
    "Data2VecVision": ("pixels", {**_VISION, "use_relative_position_bias": True}),
    "Swin": ("pixels", _WINDOWS),
    "Swinv2": ("pixels", _WINDOWS),
    "ConvNext": ("pixels", _PYRAMID),
    "ConvNextV2": ("pixels", _PYRAMID),
    "ResNet": ("pixels", {"embedding_size": 16, **_PYRAMID}),
    "RegNet": ("pixels", {"embedding_size": 16, "groups_width": 8, **_PYRAMID}),
    "Bit": ("pixels", {"embedding_size": 16, "num_groups": 8, **_PYRAMID}),
    "Segformer": ("pixels", {
        "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
    }),
    "PvtV2": ("pixels", {
        "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4], "image_size": SIDE,
    }),
    "Dinov2": ("pixels", _VISION),
    "Dinov2WithRegisters": ("pixels", _VISION),
    "DINOv3ViT": ("pixels", {**_VISION, "num_register_tokens": 2}),
    "ViTMSN": ("pixels", _VISION),
    "IJepa": ("pixels", _VISION),
    "MobileViT": ("pixels", {
        "image_size": SIDE, "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
    }),
    "MobileNetV2": ("pixels", {"depth_multiplier": 0.25, "image_size": SIDE}),
    "EfficientNet": ("pixels", {
        "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
    }),
    "PoolFormer": ("pixels", {
        "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1],
    }),
    "Levit": ("pixels", {"image_size": 64, "depths": [1, 1, 1]}),
    "FocalNet": ("pixels", {"image_size": SIDE, "embed_dim": 16, "depths": [1, 1, 1, 1]}),
    "Hiera": ("pixels", {
        "image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
    }),
    "SwiftFormer": ("pixels", {"image_size": 64, "embed_dims": [16, 32, 48, 64]}),
    "Cvt": ("pixels", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 1, 1]}),
    "Yolos": ("pixels", {**_VISION, "image_size": [SIDE, SIDE], "num_detection_tokens": 4}),
    "SiglipVision": ("pixels", _VISION),
    "CLIPVision": ("pixels", _VISION),
    # text, encoders
    "Bert": ("tokens", _TEXT),
    "Roberta": ("tokens", _TEXT),
    "Albert": ("tokens", {**_TEXT, "embedding_size": 16}),
    "DistilBert": ("tokens", {
        "vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    }),
    "Electra": ("tokens", {**_TEXT, "embedding_size": 16}),
    "Deberta": ("tokens", {
        **_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
    }),
    "DebertaV2": ("tokens", {
        **_TEXT, "relative_attention": True, "position_buckets": 4,
        "pos_att_type": ["c2p", "p2c"],
    }),
    "MPNet": ("tokens", _TEXT),
    "FNet": ("tokens", _TEXT),
    "SqueezeBert": ("tokens", {**_TEXT, "embedding_size": 32}),
    "RoFormer": ("tokens", {**_TEXT, "embedding_size": 16}),
    "Longformer": ("tokens", {**_TEXT, "attention_window": [4, 4]}),
    "ModernBert": ("tokens", {**_DECODER, "cls_token_id": 1, "sep_token_id": 2}),
    "Esm": ("tokens", {**_TEXT, "mask_token_id": 3, "position_embedding_type": "rotary"}),
    "Canine": ("tokens", {**_TEXT, "num_hash_buckets": 32, "local_transformer_stride": 4}),
    # text, decoders
    "GPT2": ("tokens", {
        "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "GPTNeo": ("tokens", {
        "vocab_size": WORDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "GPTNeoX": ("tokens", _DECODER),
    "OPT": ("tokens", {**_DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": ("tokens", {
        "vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
        "eos_token_id": 2,
    }),
    "Llama": ("tokens", _GROUPED),
    "Mistral": ("tokens", _GROUPED),
    "Qwen2": ("tokens", _GROUPED),
    "Qwen3": ("tokens", _GROUPED),
    "Gemma": ("tokens", _GROUPED),
    "Gemma2": ("tokens", _GROUPED),
    "Phi": ("tokens", _GROUPED),
    "Falcon": ("tokens", _DECODER),
    "Mixtral": ("tokens", {**_GROUPED, "num_local_experts": 3}),
    "Mamba": ("tokens", {
        "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
        "use_mambapy": False,
    }),
    "XLNet": ("tokens", {
        "vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48,
    }),
    # sequence to sequence
    "T5": ("pairs", _T5),
    "UMT5": ("pairs", _T5),
    "Bart": ("pairs", _SEQ2SEQ),
    "MBart": ("pairs", _SEQ2SEQ),
    "Pegasus": ("pairs", _SEQ2SEQ),
    "Marian": ("pairs", _SEQ2SEQ),
    # sound, and images with text
    "Wav2Vec2": ("waves", _AUDIO),
    "Hubert": ("waves", _AUDIO),
    "Whisper": ("spectrograms", {
        **_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32,
        "begin_suppress_tokens": None,
    }),
    "CLIP": ("captions", {
        "text_config": _DECODER, "vision_config": _VISION, "projection_dim": 16,
    }),
}  # fmt: skip


def _pixels(configuration: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    side = configuration.get("image_size", SIDE)
    side = side[0] if isinstance(side, list) else side
    shape = (BATCH, 3, side, side)
    return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}


def _tokens(configuration: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(3, WORDS, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # one example is shorter
    return {"input_ids": ids, "attention_mask": mask}


def _pairs(configuration: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    targets = torch.randint(3, WORDS, (BATCH, LENGTH - 3), generator=generator)
    return {**_tokens(configuration, generator), "decoder_input_ids": targets}


def _waves(configuration: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn((BATCH, 200), generator=generator, dtype=torch.float64)}


def _spectrograms(configuration: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    sound = torch.randn((BATCH, 8, 20), generator=generator, dtype=torch.float64)
    targets = torch.randint(3, WORDS, (BATCH, LENGTH - 3), generator=generator)
    return {"input_features": sound, "decoder_input_ids": targets}


def _captions(configuration: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {**_pixels({}, generator), **_tokens(configuration, generator)}


_INPUTS = {
    "pixels": _pixels, "tokens": _tokens, "pairs": _pairs, "waves": _waves,
    "spectrograms": _spectrograms, "captions": _captions,
}  # fmt: skip


def _make(name: str, kind: str, configuration: dict[str, Any]) -> Case:
    import transformers

    torch.manual_seed(0)
    chosen = getattr(transformers, f"{name}Config")(**configuration)
    chosen.use_cache = False
    chosen._experts_implementation = "eager"  # the fused products have no double precision
    model = getattr(transformers, f"{name}Model")(chosen)
    return Case(
        model, lambda generator: ((), _INPUTS[kind](configuration, generator)), call=_embeddings
    )


def _embeddings(model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    outputs = model(*args, **kwargs)
    # A contrastive model's logits meet the whole batch.
    pooled = [outputs[key] for key in ("image_embeds", "text_embeds") if key in outputs]
    return pooled or outputs


CASES: dict[str, Callable[[], Case]] = {
    name: functools.partial(_make, name, *described) for name, described in ARCHITECTURES.items()
}
