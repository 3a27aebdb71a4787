"""Train a small denoising diffusion model (DDPM) on patches of photographs and write it as ONNX, on a CPU.

    python tools/train_ddpm.py OUT --images FOLDER [--steps 600]

Needs torch, onnxscript and pillow. The network predicts the noise in 32 x 32 colour pictures (Ho et al., arXiv
2006.11239; noise of the cosine schedule, Nichol and Dhariwal, arXiv 2102.09672); FOLDER's pictures give the patches, at
random sizes and mirrored. No package ships such a network with a licence of its own, hence this script. OUT/state.pt is
written every 100 steps and a run goes on from it, also with another number of steps; OUT/ddpm.onnx has the averaged
weights (exponential, .999).
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIDE, TIMES, BATCH, DECAY = 32, 1000, 32, 0.999
WIDTHS = (32, 64, 128)
"""Channels at 32, 16 and 8 pixels."""
CONDITION = 128
"""Length of the vector that says which step it is."""


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions, each behind GroupNorm and SiLU; the step is added between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Channels in and out."""
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.step = nn.Linear(CONDITION, outputs)
        self.second = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """(N, inputs, H, W) and (N, CONDITION) -> (N, outputs, H, W)."""
        return self.shortcut(x) + self.second(self.first(x) + self.step(step)[:, :, None, None])


class Attention(nn.Module):
    """Self-attention over all pixels, four heads."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        """Channels, a multiple of heads."""
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.packed, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        n, c, h, w = x.shape
        tokens = self.packed(self.norm(x).flatten(2).transpose(1, 2))
        q, k, v = tokens.reshape(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5, dim=-1)
        seen = (weights @ v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.out(seen).transpose(1, 2).reshape(n, c, h, w)


class Denoiser(nn.Module):
    """U-Net of three resolutions, two blocks each way, attention at 8 x 8; 1.7 million parameters."""

    def __init__(self) -> None:
        """Layers with fresh weights."""
        super().__init__()
        low, middle, high = WIDTHS
        self.condition = nn.Sequential(nn.Linear(low, CONDITION), nn.SiLU(), nn.Linear(CONDITION, CONDITION), nn.SiLU())
        self.enter = nn.Conv2d(3, low, 3, padding=1)
        self.down = nn.ModuleList([Block(low, low), Block(middle, middle), Block(high, high)])
        self.shrink = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(WIDTHS)])
        self.centre, self.attention = Block(high, high), Attention(high)
        self.up = nn.ModuleList([Block(2 * low, low), Block(2 * middle, middle), Block(2 * high, high)])
        self.grow = nn.ModuleList([nn.Conv2d(b, a, 3, padding=1) for a, b in pairwise(WIDTHS)])
        self.leave = nn.Sequential(nn.GroupNorm(8, low), nn.SiLU(), nn.Conv2d(low, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy pictures (N, 3, 32, 32) float32 and steps (N,) int64 in [0, 1000) -> predicted noise (N, 3, 32, 32)."""
        half = WIDTHS[0] // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) / half * torch.arange(half, device=x.device))
        step = self.condition(torch.cat([angles.sin(), angles.cos()], dim=1))
        x, kept = self.enter(x), []
        for level, block in enumerate(self.down):
            x = block(x, step)
            kept.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        x = self.attention(self.centre(x, step))
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([x, kept[level]], dim=1), step)
            if level:
                x = self.grow[level - 1](nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        noise: Tensor = self.leave(x)
        return noise


def kept_share() -> Tensor:
    """How much of the picture's variance is left after each of 1000 steps: (1000,) float32, falling."""
    at = (torch.arange(TIMES + 1, dtype=torch.float64) / TIMES + 0.008) / 1.008
    curve = torch.cos(at * math.pi / 2) ** 2
    rates = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - rates, 0).float()


def patches(pictures: list[np.ndarray], count: int, random: np.random.Generator) -> np.ndarray:
    """(count, 3, 32, 32) float32 in [-1, 1]: squares of 32 to 128 pixels, averaged down, half of them mirrored."""
    out = np.empty((count, 3, SIDE, SIDE), np.float32)
    for row in out:
        picture = pictures[random.integers(len(pictures))]
        factor = int(random.integers(1, 1 + min(4, min(picture.shape[:2]) // SIDE)))
        top, left = (int(random.integers(length - SIDE * factor + 1)) for length in picture.shape[:2])
        square = picture[top : top + SIDE * factor, left : left + SIDE * factor]
        square = square.reshape(SIDE, factor, SIDE, factor, 3).mean((1, 3))
        row[:] = square[:, :: random.choice((-1, 1))].transpose(2, 0, 1) / 127.5 - 1
    return out


def rate(number: int, steps: int) -> float:
    """The learning rate of a step: it rises over 30 steps and falls along half a cosine."""
    return 1e-3 * min(1.0, (number + 1) / 30) * (1 + math.cos(math.pi * number / steps)) / 2


def train(model: Denoiser, pictures: list[np.ndarray], steps: int, state: Path) -> dict[str, Tensor]:
    """Minimize the squared error of the noise; averaged weights by name. Goes on from `state` where it exists."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averaged, done = {name: value.clone() for name, value in model.state_dict().items()}, 0
    if state.exists():
        stored: dict[str, Any] = torch.load(state)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        averaged, done = stored["averaged"], stored["done"]
    share, began, mean = kept_share(), time.monotonic(), 1.0
    for number in range(done, steps):
        optimizer.param_groups[0]["lr"] = rate(number, steps)
        random, noises = np.random.default_rng(number), torch.Generator().manual_seed(number)
        clean = torch.from_numpy(patches(pictures, BATCH, random))
        t = torch.randint(TIMES, (BATCH,), generator=noises)
        noise = torch.randn(clean.shape, generator=noises)
        left = share[t][:, None, None, None]
        loss = nn.functional.mse_loss(model(left.sqrt() * clean + (1 - left).sqrt() * noise, t), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in model.state_dict().items():
            averaged[name].lerp_(value, 1 - min(DECAY, (1 + number) / (10 + number)))
        mean += (float(loss.detach()) - mean) / min(number + 1, 200)
        if (number + 1) % 100 == 0 or number + 1 == steps:
            print(f"step {number + 1}: mean loss {mean:.4f}, {time.monotonic() - began:.0f} s", flush=True)
            stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
            torch.save(stored | {"done": number + 1}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").rename(state)
    return averaged


def main() -> None:
    """Read options, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="folder of PNG and JPEG photographs")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    files = sorted(path for path in options.images.iterdir() if path.suffix in {".png", ".jpg", ".jpeg"})
    pictures = [np.asarray(Image.open(path).convert("RGB"), np.float32) for path in files]
    torch.manual_seed(0)
    model = Denoiser()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pictures)} pictures", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    model.load_state_dict(train(model, pictures, options.steps, options.out / "state.pt"))
    example = (torch.randn(2, 3, SIDE, SIDE), torch.tensor([10, 500]))
    shapes = {"x": {0: torch.export.Dim("batch")}, "t": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(model.eval(), example, dynamic_shapes=shapes, dynamo=True, output_names=["noise"])
    program.save(options.out / "ddpm.onnx", external_data=False)


if __name__ == "__main__":
    main()
