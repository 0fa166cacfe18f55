"""An MLP on tensors: handwritten digits, 64 numbers each. Seconds on a CPU; needs scikit-learn, for its digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import goodfit

x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, val, test = ((x[rows].float() / 16, y[rows]) for rows in order.split([1257, 270, 270]))

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
run = goodfit.fit(module, train, val, test, loss=nn.CrossEntropyLoss(), metrics=["accuracy"], epochs=20)

print(f"test accuracy {run.metrics['test']['accuracy']:.3f}")
print("the first three:", module(test[0][:3]).argmax(dim=1).tolist(), "are", test[1][:3].tolist())
