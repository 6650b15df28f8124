"""What forward leaves to backward of the FP8 cells."""
from __future__ import annotations
from typing import NamedTuple
from torch import Tensor
INPUT_DTYPE, FP8, GROUPED = 1, 2, 4
class Saved(NamedTuple):
    shift: Tensor
    q8: Tensor
    k8: Tensor
    v8: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
def padded_head_dim(D): return max(32, 1 << (D - 1).bit_length())
def expands_keys(H, G, kinds): return H != G and kinds not in (1, 2)
