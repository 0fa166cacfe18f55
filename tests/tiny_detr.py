"""Configurations of transformers' detectors of a hundred thousand weights, and folders as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_HGNET = {
    "model_type": "hgnet_v2", "embedding_size": 8, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 16, 24], "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 16, 24, 32],
    "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1], "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5], "stage_downsample": [False, True, True, True], "out_indices": [2, 3, 4],
    "use_learnable_affine_block": False,
}  # fmt: skip
_SHARED = {
    "encoder_hidden_dim": 32, "d_model": 32, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32, 32, 32],
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 2,
    "num_queries": 20, "num_denoising": 10, "freeze_backbone_batch_norms": False,
}  # fmt: skip
_RESNET = {
    "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
_WINDOWS = {
    "model_type": "rf_detr_dinov2", "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 96,
    "patch_size": 8, "num_windows": 2, "out_features": ["stage2", "stage4"],
}  # fmt: skip
_THIN = {"hidden_expansion": 0.5, "depth_mult": 0.34}
TINY = {
    "d_fine": {"backbone_config": _HGNET, **_SHARED, **_THIN},
    "rt_detr_v2": {"backbone_config": _RESNET, **_SHARED},
    "deimv2": {"backbone_config": _HGNET, **_SHARED, **_THIN},
    "rf_detr": {"backbone_config": _WINDOWS, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_self_attention_heads": 2,
                "decoder_cross_attention_heads": 2, "num_queries": 20, "group_detr": 3, "c2f_num_blocks": 1, "dropout": 0.0,
                "intermediate_size": 32},
}  # fmt: skip


def write_tiny(
    folder: Path, kind: str, *, labels: list[str], seed: int = 0, masks: bool = False, **more: object
) -> Path:
    """A folder with config.json and model.safetensors of random weights, as the library saves them."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**TINY[kind], **more}, num_labels=len(labels))
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in enumerate(labels)}
    made = (
        transformers.RfDetrForInstanceSegmentation(config)
        if masks
        else transformers.AutoModelForObjectDetection.from_config(config)
    )
    made.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    return folder
