"""Small networks of everyday kinds that no library gives in one call, for `networks.py`. Needs torch."""

from __future__ import annotations

from typing import Any

import networks
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lstm(nn.Module):
    """Two bidirectional layers and a classifier of every frame."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.recurrent, self.head = nn.LSTM(40, 64, num_layers=2, bidirectional=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Any:
        """[frames, batch, 40] -> [frames, batch, 10]."""
        return self.head(self.recurrent(x)[0])


class Gru(nn.Module):
    """One layer, its last state and a classifier."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.recurrent, self.head = nn.GRU(40, 96, batch_first=True), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Any:
        """[batch, frames, 40] -> classes, and the last state."""
        every, last = self.recurrent(x)
        return self.head(every[:, -1]), last


def unit(inside: int, out: int, kernel: int = 3, stride: int = 1, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Convolution, batch normalization, activation."""
    return nn.Sequential(nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), act())


class Split(nn.Module):
    """Half of the channels refined, all concatenated."""

    def __init__(self, channels: int) -> None:
        """Random weights."""
        super().__init__()
        self.first, self.last = unit(channels, channels, 1), unit(channels * 3 // 2, channels, 1)
        self.refine = nn.Sequential(unit(channels // 2, channels // 2), unit(channels // 2, channels // 2))

    def forward(self, x: Tensor) -> Any:
        """Same shape."""
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b, self.refine(b) + b], 1))


class Yolo(nn.Module):
    """Pyramid of two levels, boxes as distributions over distances, decoded on a grid."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.stem = nn.Sequential(unit(3, 16, 3, 2), unit(16, 32, 3, 2), Split(32), unit(32, 64, 3, 2), Split(64))
        self.deep = nn.Sequential(unit(64, 128, 3, 2), Split(128))
        self.up = unit(192, 64, 1)
        self.heads = nn.ModuleList(nn.Conv2d(n, 4 * 8 + 5, 1) for n in (64, 128))

    def forward(self, image: Tensor) -> Any:
        """[batch, 3, h, w] -> [batch, 9, boxes]: corners and scores."""
        high = self.stem(image)
        low = self.deep(high)
        high = self.up(torch.cat([high, F.interpolate(low, scale_factor=2.0, mode="nearest")], 1))
        found = []
        for level, head, stride in zip((high, low), self.heads, (8, 16), strict=True):
            raw = head(level)
            h, w = raw.shape[2:]
            distances, scores = raw.flatten(2).split([32, 5], 1)
            bins = torch.arange(8, dtype=raw.dtype)
            sides = (distances.unflatten(1, (4, 8)).softmax(2) * bins[:, None]).sum(2)
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            centre = torch.stack([x, y]).to(raw.dtype).flatten(1) + 0.5
            corners = torch.cat([centre - sides[:, :2], centre + sides[:, 2:]], 1) * stride
            found.append(torch.cat([corners, scores.sigmoid()], 1))
        return torch.cat(found, 2)


class Detector(nn.Module):
    """A one-stage detector whose graph ends with the suppression of overlapping boxes."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.body = nn.Sequential(unit(3, 16, 3, 2), unit(16, 32, 3, 2), unit(32, 64, 3, 2), unit(64, 64))
        self.head = nn.Conv2d(64, 5, 3, padding=1)

    def forward(self, image: Tensor) -> Any:
        """[1, 3, h, w] -> boxes [n, 4] and scores [n] that are kept."""
        import torchvision

        raw = self.head(self.body(image))[0].flatten(1).T.float()
        centre, size = raw[:, :2].sigmoid() * 96, raw[:, 2:4].exp().clamp(max=4) * 12
        boxes, scores = torch.cat([centre - size / 2, centre + size / 2], 1), raw[:, 4].sigmoid()
        kept = torchvision.ops.nms(boxes, scores, 0.5)
        return boxes[kept], scores[kept]


class SuperResolution(nn.Module):
    """Residual blocks, pixel shuffle by 2, and the bilinearly enlarged image added."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        blocks = (
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.PReLU(32), nn.Conv2d(32, 32, 3, padding=1))
            for _ in range(3)
        )
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Conv2d(32, 12, 3, padding=1)

    def forward(self, image: Tensor) -> Any:
        """[batch, 3, h, w] -> [batch, 3, 2h, 2w]."""
        x = start = self.first(image)
        for block in self.blocks:
            x = x + 0.2 * block(x)
        enlarged = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
        return F.pixel_shuffle(self.last(x + start), 2) + enlarged


class Enhancement(nn.Module):
    """Conv-TasNet in small: encoder, dilated depthwise convolutions, mask, decoder."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.encoder, self.decoder = nn.Conv1d(1, 64, 16, 8), nn.ConvTranspose1d(64, 1, 16, 8)
        self.start = nn.Sequential(nn.GroupNorm(1, 64), nn.Conv1d(64, 48, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(48, 96, 1), nn.PReLU(), nn.GroupNorm(1, 96),
                nn.Conv1d(96, 96, 3, padding=2**i, dilation=2**i, groups=96), nn.PReLU(), nn.GroupNorm(1, 96),
                nn.Conv1d(96, 48, 1),
            )
            for i in range(3)
        )  # fmt: skip
        self.mask = nn.Conv1d(48, 64, 1)

    def forward(self, wave: Tensor) -> Any:
        """[batch, 1, n] -> the same."""
        coded = self.encoder(wave).relu()
        x = self.start(coded)
        for block in self.blocks:
            x = x + block(x)
        return self.decoder(coded * self.mask(x).sigmoid())


class VoiceDetection(nn.Module):
    """A learnt spectrum, convolutions and an LSTM whose state goes in and out."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.spectrum = nn.Conv1d(1, 130, 256, 64, bias=False)
        self.body = nn.Sequential(nn.Conv1d(65, 64, 3, 2, 1), nn.ReLU(), nn.Conv1d(64, 64, 3, 2, 1), nn.ReLU())
        self.recurrent, self.head = nn.LSTM(64, 64, batch_first=True), nn.Conv1d(64, 1, 1)

    def forward(self, wave: Tensor, hidden: Tensor, cell: Tensor) -> Any:
        """[batch, 1, 1024] and state -> probability [batch, 1], and state."""
        parts = self.spectrum(F.pad(wave, (64, 64), mode="reflect"))
        x = self.body((parts[:, :65] ** 2 + parts[:, 65:] ** 2).sqrt())
        x, (hidden, cell) = self.recurrent(x.transpose(1, 2), (hidden, cell))
        return self.head(x.relu().transpose(1, 2)).sigmoid().mean(2), hidden, cell


class Keywords(nn.Sequential):
    """Depthwise separable convolutions of a keyword spotter."""

    def __init__(self) -> None:
        """Random weights."""
        layers: list[nn.Module] = [unit(1, 64, 9, 2, nn.ReLU)]
        for _ in range(3):
            layers += [nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64), nn.ReLU6(), unit(64, 64, 1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12), nn.LogSoftmax(-1))

    def forward(self, features: Tensor) -> Any:
        """[batch, 1, time, frequency] -> [batch, 12]."""
        return super().forward(features)


class Crnn(nn.Module):
    """Convolutions over a line of text, two bidirectional LSTMs over its columns."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.body = nn.Sequential(
            unit(1, 32, 3, 1, nn.ReLU), nn.MaxPool2d(2), unit(32, 64, 3, 1, nn.ReLU), nn.MaxPool2d(2),
            unit(64, 96, 3, 1, nn.ReLU), nn.MaxPool2d((8, 1)),
        )  # fmt: skip
        self.recurrent, self.head = nn.LSTM(96, 48, num_layers=2, bidirectional=True), nn.Linear(96, 37)

    def forward(self, line: Tensor) -> Any:
        """[batch, 1, 32, w] -> [w / 4, batch, 37] log-probabilities."""
        columns = self.body(line).squeeze(2).permute(2, 0, 1)
        return self.head(self.recurrent(columns)[0]).log_softmax(2)


class Pitch(nn.Module):
    """CREPE in small: wide convolutions over a normalized frame."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        sizes = ((1, 32, 512, 4), (32, 32, 64, 1), (32, 64, 64, 1))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, (k, 1), (s, 1)), nn.ReLU(), nn.BatchNorm2d(b), nn.MaxPool2d((2, 1)))
            for a, b, k, s in sizes
        )
        self.paddings, self.head = (254, 32, 32), nn.Linear(64 * 31, 360)

    def forward(self, wave: Tensor) -> Any:
        """[batch, 1024] -> [batch, 360]."""
        wave = (wave - wave.mean(1, keepdim=True)) / (wave.std(1, keepdim=True) + 1e-6)
        x = wave[:, None, :, None]
        for layer, size in zip(self.layers, self.paddings, strict=True):
            x = layer(F.pad(x, (0, 0, size, size - 1 + size % 2)))
        return self.head(x[:, :, :31].flatten(1)).sigmoid()


class PointNet(nn.Module):
    """Points, a learnt 3 x 3 transform, features, maximum over the points."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.align = nn.Sequential(nn.Conv1d(3, 32, 1), nn.ReLU(), nn.Conv1d(32, 64, 1), nn.ReLU())
        self.transform = nn.Linear(64, 9)
        self.body = nn.Sequential(nn.Conv1d(3, 64, 1), nn.BatchNorm1d(64), nn.ReLU(), nn.Conv1d(64, 128, 1))
        self.head = nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8))

    def forward(self, points: Tensor) -> Any:
        """[batch, 3, n] -> [batch, 8]."""
        matrix = self.transform(self.align(points).amax(2)).view(-1, 3, 3)
        moved = torch.bmm(points.transpose(1, 2), matrix + torch.eye(3, dtype=points.dtype)).transpose(1, 2)
        return self.head(self.body(moved).max(2).values)


class Autoencoder(nn.Module):
    """The autoencoder of a latent diffusion model, mean of the posterior decoded."""

    def __init__(self) -> None:
        """Random weights."""
        from diffusers import AutoencoderKL

        super().__init__()
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        self.model = AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, norm_num_groups=8, **blocks)

    def forward(self, image: Tensor) -> Any:
        """[batch, 3, h, w] -> the same."""
        return self.model.decode(self.model.encode(image).latent_dist.mean).sample


class _Step(nn.Module):
    """One step of a decoder with a cache of keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **past: Tensor) -> Any:
        """Ids of one token and keys and values per layer -> logits, and keys and values that are longer by one."""
        from transformers import DynamicCache

        cache, tensors = DynamicCache(), list(past.values())
        for i in range(0, len(tensors), 2):
            cache.update(tensors[i], tensors[i + 1], i // 2)
        made = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return made.logits, *(t for layer in made.past_key_values.layers for t in (layer.keys, layer.values))


def llama_step() -> nn.Module:
    """A decoder of Llama's kind."""
    return _Step(networks.hf("LlamaForCausalLM", "LlamaConfig", "eager", **networks.LLAMA)())


def gpt2_step() -> nn.Module:
    """A decoder of GPT-2's kind."""
    return _Step(networks.hf("GPT2LMHeadModel", "GPT2Config", "eager", **networks.GPT2)())


class _Detr(nn.Module):
    def __init__(self) -> None:
        from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

        super().__init__()
        body = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic")
        body.out_features = ["stage4"]
        config = DetrConfig(
            backbone_config=body, use_timm_backbone=False, backbone=None, use_pretrained_backbone=False,
            d_model=64, num_queries=10, num_labels=5, **networks.SIDES,
        )  # fmt: skip
        self.model = DetrForObjectDetection(config)

    def forward(self, pixel_values: Tensor) -> Any:
        found = self.model(pixel_values=pixel_values)
        return found.logits, found.pred_boxes


def detr() -> nn.Module:
    """Hugging Face's DETR on a small ResNet: logits and boxes."""
    return _Detr()


def clip() -> nn.Module:
    """Hugging Face's CLIP."""
    from transformers import CLIPConfig, CLIPModel

    text = {**networks.TEXT, "eos_token_id": 499, "bos_token_id": 498, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=networks.VISION, projection_dim=64))


class _Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, positions: Tensor) -> Tensor:
        apart = positions[:, None] - positions[None]
        distance = (apart.square().sum(2) + 1e-3).sqrt()
        centres = torch.linspace(0, 4, 16, dtype=positions.dtype)
        features = torch.exp(-((distance[..., None] - centres) ** 2)).sum(1)
        return self.layers(features).sum()


class _Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.energy = _Energy()

    def forward(self, positions: Tensor) -> Any:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_(True)
            energy = self.energy(positions)
            (gradient,) = torch.autograd.grad(energy, positions)
        return energy, -gradient


def forces() -> nn.Module:
    """Energy of atoms from distances through an MLP, and its gradient: traced first, for exporters stop at `grad`."""
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    atoms = torch.randn(networks.SIZES["atoms"][0], 3)
    return make_fx(_Forces().requires_grad_(False), core_aten_decompositions())(atoms)
