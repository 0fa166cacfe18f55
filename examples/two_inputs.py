"""A picture and a question together: a nested batch, from a dataset that augments. Seconds on a CPU; needs scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import goodfit


class Questions(torch.utils.data.Dataset):
    """A digit, moved by up to a pixel, and a question about it: 0 is it even, 1 is it above 4, 2 is it a multiple of 3?"""

    def __init__(self, rows: range, *, moved: bool) -> None:
        self.images, self.digits = load_digits().images[rows] / 16, load_digits().target[rows]
        self.moved = moved

    def __len__(self) -> int:
        return 3 * len(self.digits)

    def __getitem__(self, number: int) -> tuple[dict[str, torch.Tensor], int]:
        digit, question = int(self.digits[number // 3]), number % 3
        image = torch.tensor(self.images[number // 3], dtype=torch.float32)[None]
        if self.moved:  # the random state is seeded for each sample: a resumed run draws the same
            image = image.roll(int(torch.randint(-1, 2, ())), dims=2)
        answer = (digit % 2 == 0, digit > 4, digit % 3 == 0)[question]
        return {"image": image, "tokens": torch.tensor([question])}, int(answer)


class Both(nn.Module):
    """An image (N, 1, 8, 8) and tokens (N, 1) to logits (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64))
        self.read = nn.EmbeddingBag(3, 64)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat((self.see(image), self.read(tokens)), dim=1))


torch.manual_seed(0)
train, val = Questions(range(1400), moved=True), Questions(range(1400, 1797), moved=False)
run = goodfit.fit(Both(), train, val, loss=nn.CrossEntropyLoss(), metrics=["accuracy"], epochs=4, batch=64)
print(f"validation accuracy {run.metrics['val']['accuracy']:.3f}")
