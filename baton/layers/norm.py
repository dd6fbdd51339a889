"""The weight of an RMSNorm (Zhang & Sennrich 2019); where and how it is applied is the decoder's and the kernels' business."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
