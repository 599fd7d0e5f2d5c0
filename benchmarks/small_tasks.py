"""Three small trainings without Lightning, for measurements that need many of them: digits twice, and a language."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

BATCH = 32


@dataclass(frozen=True)
class Task:
    """A training.

    Args:
        model: the model.
        batches: endless batches of inputs and targets, the same for a seed.
        evaluation: inputs and targets of the evaluation.
        lr: Adam's learning rate.
        weight_decay: AdamW's; 0 stands for Adam.
    """

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    evaluation: tuple[Tensor, Tensor]
    lr: float
    weight_decay: float = 0.0

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def evaluate(self) -> float:
        self.model.eval()
        loss = self.loss(*self.evaluation).item()
        self.model.train()
        return loss


def digits_mlp(seed: int) -> Task:
    """Two hidden layers of 64 on the digits of scikit-learn, evaluated on the whole training set."""
    torch.manual_seed(seed)
    inputs, targets = _digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Task(model, _batches(inputs, targets, seed), (inputs, targets), lr=3e-3)


def digits_cnn(seed: int) -> Task:
    """Two convolutions with batch norm, whose biases get no gradient but rounding, on the same."""
    torch.manual_seed(seed)
    inputs, targets = _digits()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    return Task(model, _batches(inputs, targets, seed), (inputs, targets), lr=3e-3)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.attend(self.norms[0](x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.project(mixed)
        return x + self.feed(self.norms[1](x))


class Transformer(nn.Module):
    """Two blocks, about 55,000 parameters."""

    def __init__(self, words: int = 32, width: int = 48, length: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(_Block(width), _Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(words) + self.place[: words.shape[1]])))


def markov(seed: int, words: int = 32, width: int = 48, batch: int = BATCH) -> Task:
    """A language whose next word depends on the last two, for a small transformer, trained with AdamW."""
    torch.manual_seed(seed)
    table = torch.distributions.Dirichlet(torch.full((words,), 0.1)).sample((words, words))
    evaluation = _sentences(table, 256)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield _sentences(table, batch)

    return Task(Transformer(words, width), batches(), evaluation, lr=3e-3, weight_decay=0.1)


TASKS: dict[str, Callable[[int], Task]] = {"digits, MLP": digits_mlp, "digits, CNN": digits_cnn, "Markov text, transformer": markov}


def _digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def _batches(inputs: Tensor, targets: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(inputs), generator=generator).split(BATCH)[:-1]:
            yield inputs[chosen], targets[chosen]


def _sentences(table: Tensor, count: int, length: int = 32) -> tuple[Tensor, Tensor]:
    words = [torch.randint(len(table), (count,)), torch.randint(len(table), (count,))]
    for _ in range(length - 1):
        words.append(torch.multinomial(table[words[-2], words[-1]], 1).squeeze(1))
    text = torch.stack(words, dim=1)
    return text[:, :-1], text[:, 1:]
