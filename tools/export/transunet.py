"""A TransUNet (arXiv 2102.04306) for volumes, written from the paper: CNN stem, ViT-B bottleneck, cascaded decoder.

    python tools/export/transunet.py transunet.onnx [--checkpoint model.pt] [--samples FOLDER --volume ct.nii.gz]

3-D, as MedPTQ (arXiv 2501.17343) uses it, with convolutions of three dimensions and linear upsampling. The paper's
stem is a ResNet-50; here it has a pair of convolutions a level, whose widths make the file as large as MedPTQ's. The
names of weights are ours: a checkpoint of another implementation does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import VOLUME, main
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Pair(nn.Sequential):
    """Twice convolution, BatchNorm, ReLU; the first convolution has the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        """Of these channels."""
        parts: list[nn.Module] = []
        for channels, step in ((inputs, stride), (outputs, 1)):
            convolution = nn.Conv3d(channels, outputs, 3, step, 1, bias=False)
            parts += [convolution, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*parts)


class Layer(nn.Module):
    """A layer of the transformer: attention, then an MLP with GELU, each behind a LayerNorm."""

    def __init__(self, hidden: int, heads: int, mlp: int) -> None:
        """Of these widths."""
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(), nn.Linear(mlp, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (batch, tokens, hidden) to tokens."""
        batch, tokens, hidden = x.shape
        packed = self.qkv(self.before(x)).reshape(batch, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, hidden)
        x = x + self.out(mixed)
        return x + self.mlp(self.between(x))


class Up(nn.Module):
    """Twice the size by linear interpolation, the shortcut beside it if there is one, then a pair of convolutions."""

    def __init__(self, inputs: int, shortcut: int, outputs: int) -> None:
        """Of these channels; 0: no shortcut."""
        super().__init__()
        self.larger = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)
        self.pair = Pair(inputs + shortcut, outputs)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        """To the next level."""
        x = self.larger(x)
        return self.pair(x if shortcut is None else torch.cat([x, shortcut], 1))


class TransUNet(nn.Module):
    """The network; every width is a level: 1/2, 1/4, ... of the input, and the last one's voxels are the tokens."""

    def __init__(
        self,
        in_channels: int,
        classes: int,
        patch: Sequence[int],
        widths: Sequence[int],
        hidden: int,
        layers: int,
        heads: int,
        mlp: int,
    ) -> None:
        """For inputs of this patch alone: every token has a place."""
        super().__init__()
        self.grid = [size // 2 ** len(widths) for size in patch]
        self.stem = nn.ModuleList(
            Pair(inputs, outputs, 2) for inputs, outputs in zip((in_channels, *widths), widths, strict=False)
        )
        self.embed = nn.Conv3d(widths[-1], hidden, 1)
        self.places = nn.Parameter(torch.randn(1, self.grid[0] * self.grid[1] * self.grid[2], hidden) * 0.02)
        self.layers = nn.Sequential(*(Layer(hidden, heads, mlp) for _ in range(layers)), nn.LayerNorm(hidden))
        self.narrow = nn.Sequential(
            nn.Conv3d(hidden, widths[-1], 3, padding=1, bias=False), nn.BatchNorm3d(widths[-1]), nn.ReLU(inplace=True)
        )
        shortcuts = [*widths[-2::-1], 0]
        outputs = [*widths[-2::-1], widths[0]]
        self.ups = nn.ModuleList(
            Up(inputs, shortcut, made)
            for inputs, shortcut, made in zip((widths[-1], *outputs), shortcuts, outputs, strict=False)
        )
        self.head = nn.Conv3d(widths[0], classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """A volume (batch, channels, depth, height, width) to the classes' scores of every voxel."""
        levels = []
        for level in self.stem:
            image = level(image)
            levels.append(image)
        tokens = self.embed(image).flatten(2).transpose(1, 2) + self.places
        tokens = self.layers(tokens)
        made = self.narrow(tokens.transpose(1, 2).unflatten(2, self.grid))
        for up, shortcut in zip(self.ups, [*levels[-2::-1], None], strict=True):
            made = up(made, shortcut)
        return self.head(made)


def build(
    in_channels: int = 1,
    classes: int = 14,
    patch: tuple[int, ...] = (96, 96, 96),
    widths: tuple[int, ...] = (16, 32, 64, 128),
    hidden: int = 768,
    layers: int = 12,
    heads: int = 12,
    mlp: int = 3072,
) -> Any:
    """The network, with ViT-B in its middle."""
    return TransUNet(in_channels, classes, patch, widths, hidden, layers, heads, mlp)


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
