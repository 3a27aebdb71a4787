"""PyTorch modules for tests, as users write them. Needs torch: a test file skips before it imports this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[..., Any]


class Of(nn.Module):
    """A module of some layers whose forward is a function of it and its inputs."""

    def __init__(self, compute: Forward, **parts: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        self.lin = nn.Linear(8, 8)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


class Classifier(nn.Module):
    """Convolutions, a BatchNorm that has seen data, dropout; two inputs, one of them optional; a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.layer1[1].running_mean.normal_()
            self.layer1[1].running_var.uniform_(0.5, 2)

    def forward(self, image: Tensor, scale: Tensor | None = None, *, double: bool = False) -> dict[str, Any]:
        features = self.layer1(image).mean((2, 3))
        if scale is not None:
            features = features * scale
        if double:
            features = features * 2
        return {"logits": self.head(self.drop(features)), "features": features, "unused": None}


class Recurrent(nn.Module):
    """Token ids through an embedding and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 12)
        self.rnn = nn.LSTM(12, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.head(self.rnn(self.words(ids))[0][:, -1])
        return made


@dataclass
class Parts:
    """What a module may return."""

    mean: Tensor
    levels: list[Tensor]


def as_dataclass(self: Of, x: Tensor) -> Parts:
    return Parts(mean=self.lin(x).mean(1), levels=[x, self.lin(x)])


def by_value(self: Of, x: Tensor) -> Tensor:
    made: Tensor = self.lin(x)
    if made.sum() > 0:
        return made * 2
    return made - 1


def by_condition(self: Of, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (self.lin(x),))


def missing(self: Of, x: Tensor) -> Tensor:
    import package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    return x


def rotated(self: Of, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(self.lin(x).reshape(-1, 4, 2))
    return torch.view_as_real(pairs * torch.exp(1j * torch.arange(4.0)))


def counting(self: Any, x: Tensor) -> Tensor:
    self.norm.num_batches_tracked.add_(1)
    made: Tensor = self.lin(x) + self.norm.num_batches_tracked
    return made


def attention(self: Of, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], self.lin(x)[:, None], x[:, None], dropout_p=0.25)


# What no ONNX file can hold -> words of the message.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: Of(lambda s, x: F.dropout(s.lin(x), 0.5)), "dropout is left on & torch_networks.py line"),
    "attention": (lambda: Of(attention), "drops 0.25 & dropout_p & torch_networks.py line"),
    "BatchNorm": (
        lambda: Of(lambda s, x: s.norm(s.lin(x)), norm=nn.BatchNorm1d(8, track_running_stats=False)),
        "statistics of the batch & in 'norm'",
    ),
    "random": (lambda: Of(lambda s, x: s.lin(x) + torch.randn_like(x)), "random numbers & randn_like"),
    "branch": (lambda: Of(by_value), "depends on values & torch.cond & torch_networks.py line"),
    "complex": (lambda: Of(rotated), "complex numbers & view_as_real"),
    "complex output": (lambda: Of(lambda s, x: torch.fft.rfft(s.lin(x))), "'output' is complex"),
    "package": (lambda: Of(missing), "package_that_nobody_has & pip install & torch_networks.py line"),
    "object": (lambda: Of(lambda s, x: object()), "returns a object & tuple, a dict or a dataclass"),
    "size": (lambda: Of(lambda s, x: s.lin(x[:, :5])), "example inputs & torch_networks.py line"),
    "numpy": (lambda: Of(lambda s, x: torch.from_numpy(s.lin(x).numpy())), "numpy"),
    "state": (lambda: Of(counting, norm=nn.BatchNorm1d(8)), "norm.num_batches_tracked & other outputs"),
    "operator": (lambda: Of(lambda s, x: torch.special.i0e(s.lin(x))), "i0e & other operators"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "device meta"),
}
