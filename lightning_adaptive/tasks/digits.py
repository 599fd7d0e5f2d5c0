"""Handwritten digits: 1,797 images of 8 x 8 pixels that scikit-learn ships, and a small convolutional net."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

CLASSES = 10


class DigitsData(LightningDataModule):
    """The images in a stratified split: 60 % train, 20 % validation, 20 % test; pixels from 0 to 1.

    Args:
        batch_size: images of a batch on each process.
        split_seed: seed of the split.
        num_workers: processes that load.

    Raises:
        ValueError: for numbers of images or processes that cannot be.
    """

    def __init__(self, batch_size: int = 32, split_seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size is at least 1 and num_workers at least 0, not {batch_size} and {num_workers}")
        self.batch_size = batch_size
        self.split_seed = split_seed
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Splits the images; the same split on every process."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        rest, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=self.split_seed)
        train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=self.split_seed)
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        targets = torch.tensor(labels)
        self.train, self.validation, self.test = (
            TensorDataset(images[index], targets[index]) for index in (train, validation, test)
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Batches in a fixed order."""
        return self._loader(self.validation)

    def test_dataloader(self) -> DataLoader:
        """Batches in a fixed order."""
        return self._loader(self.test)

    def _loader(self, dataset: TensorDataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)


class DigitsNet(LightningModule):
    """Two convolutions with batch norm, pooling, and a linear layer; it leaves the optimizer to the configuration.

    Args:
        width: channels of the first convolution; the second has twice as many.
        dropout: share of features dropped before the last layer, 0 to 1.
    """

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * 16, CLASSES),
        )
        metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(CLASSES, average="micro"),
                "f1": MulticlassF1Score(CLASSES),
                "calibration_error": MulticlassCalibrationError(CLASSES),
            }
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def configure_model(self) -> None:
        """Shards the layers under Lightning's ``ModelParallelStrategy`` (FSDP2), once; nothing elsewhere."""
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.net, FSDPModule):
            return  # Lightning asks again before a test
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``(batch, 10)`` from images of shape ``(batch, 1, 8, 8)``."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        images, targets = batch
        loss = nn.functional.cross_entropy(self(images), targets)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._evaluate(batch, self.val_metrics, "val/loss")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self._evaluate(batch, self.test_metrics, "test/loss")

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, loss_name: str) -> None:
        images, targets = batch
        logits = self(images)
        metrics.update(logits.softmax(dim=-1), targets)
        self.log_dict(metrics, on_step=False, on_epoch=True)
        self.log(loss_name, nn.functional.cross_entropy(logits, targets), on_step=False, on_epoch=True, sync_dist=True)
