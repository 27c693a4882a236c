"""Write a DINOv2 encoder of transformers as the same network of timm, whose attention has one weight for query, key and value.

    python recipes/dinov2_to_timm.py --source vit_small_patch14 --output_dir vit_small_patch14_timm

What comes out is loaded as any folder of timm is, as an encoder or under a new head. It was made to purify the same weights in
both libraries (model_cards/vit.md). The features of both are compared before anything is written.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import Dinov2Model
from transformers.utils import SAFE_WEIGHTS_NAME

from d3_hf.cli import run
from d3_hf.models import load_encoder
from d3_hf.models.source import preprocessing_of
from d3_hf.options.parser import Parser

TOLERANCE = 1e-4  # of the largest feature
# Names of transformers and of timm; those of a block stand after `encoder.layer.N.` and `blocks.N.`.
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
IN_BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale2.lambda1": "ls2.gamma",
}
FUSED = ("query", "key", "value")


@dataclass
class ConversionArguments:
    """From where to where.

    Args:
        source: Folder or Hub id of a `Dinov2Model`.
        output_dir: Folder that is made.
    """

    source: str = field(metadata={"help": "Folder or Hub id of a DINOv2 encoder of transformers."})
    output_dir: str = field(metadata={"help": "Folder for the same network of timm."})


def timm_weights(encoder: Dinov2Model) -> dict[str, Tensor]:
    """The weights under timm's names."""
    with tempfile.TemporaryDirectory() as saved:  # under the names of the file format, which releases agree on
        encoder.save_pretrained(saved)
        weights = load_file(Path(saved) / SAFE_WEIGHTS_NAME)
    found = {ours: weights[name] for name, ours in OUTSIDE.items()}
    for number in range(encoder.config.num_hidden_layers):
        block = f"encoder.layer.{number}."
        for name, ours in IN_BLOCK.items():
            found |= {
                f"blocks.{number}.{ours}{key.removeprefix(block + name)}": tensor
                for key, tensor in weights.items()
                if key.startswith(block + name)
            }
        for end in ("weight", "bias"):
            parts = [weights[f"{block}attention.attention.{part}.{end}"] for part in FUSED]
            found[f"blocks.{number}.attn.qkv.{end}"] = torch.cat(parts)
    return found


def timm_network(encoder: Dinov2Model) -> tuple[nn.Module, dict]:
    """timm's network with the encoder's weights, in evaluation mode, and the arguments that shaped it.

    Raises:
        ValueError: It is no DINOv2, or one with SwiGLU, whose blocks timm builds otherwise.
    """
    config = encoder.config
    if not isinstance(encoder, Dinov2Model) or config.use_swiglu_ffn:
        raise ValueError(f"a {type(encoder).__name__} of this kind has no counterpart here: give a Dinov2Model without SwiGLU")
    shape = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.mlp_ratio,
    }
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, global_pool="token", **shape)
    network.load_state_dict(timm_weights(encoder))
    return network.eval(), shape


@torch.no_grad()
def check_features(encoder: Dinov2Model, network: nn.Module) -> None:
    """Raise a ValueError if the two give a random image of the encoder's own size other features."""
    images = torch.randn(1, 3, encoder.config.image_size, encoder.config.image_size, generator=torch.Generator().manual_seed(0))
    expected, found = encoder(pixel_values=images).last_hidden_state[:, 0], network(images)
    if (worst := (found - expected).abs().max() / expected.abs().max()) > TOLERANCE:
        raise ValueError(f"timm's network gives other features, by {worst:.1e} of the largest: nothing was written")


def main(argv: list[str]) -> None:
    """Run ``--source ENCODER --output_dir FOLDER``.

    Raises:
        FileExistsError: The folder is there and not empty.
        ValueError: See `load_encoder`, `timm_network` and `check_features`.
    """
    (options,) = Parser([ConversionArguments]).read(argv)
    folder = Path(options.output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name another folder")
    encoder = load_encoder(options.source).eval()
    network, shape = timm_network(encoder)
    check_features(encoder, network)
    seen = preprocessing_of(encoder)
    save_for_hf(network, folder, model_args=shape, safe_serialization=True, data_config={"mean": seen.mean, "std": seen.std})
    print(f"{folder}: vit_small_patch14_dinov2 of timm with the weights of {options.source}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
