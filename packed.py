"""
The packed form of a pruned matrix: one bit for each weight, and the survivors.

Reading   before llama.py, whose loading and saving use it. Imports nothing from this folder.
Shapes    W (d_out, d_in); mask (d_out, ceil(d_in / 8)) uint8, bit j % 8 of byte j // 8 for column j; values (count,), row by row.
"""
import torch
import torch.nn.functional as F


def pack(W, kept):
    """W (d_out, d_in) where `kept` (d_out, d_in) bool holds -> (mask, values); unused bits are 0."""
    bits = F.pad(kept, (0, -kept.shape[1] % 8)).view(len(kept), -1, 8)
    return (bits * (1 << torch.arange(8))).sum(-1, dtype=torch.uint8), W[kept]


def unpack(mask, values, d_in, name=""):
    """The inverse of `pack`, +0.0 where nothing was kept; ValueError when mask and values do not fit together."""
    table = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool()
    kept = table.index_select(0, mask.flatten().int()).view(len(mask), -1)
    place = kept[:, :d_in].flatten().cumsum(0, dtype=torch.int32)
    if int(kept.sum()) != len(values) or kept[:, d_in:].any():
        raise ValueError(f"packed tensor {name} keeps {int(kept.sum())} weights, but {len(values)} values are there")
    return torch.cat([values.new_zeros(1), values]).index_select(0, place.mul_(kept[:, :d_in].flatten())).view(len(mask), d_in)


def dense_name(name):
    """The parameter that a stored tensor belongs to: NAME.mask and NAME.kept are the packed form of NAME."""
    return name.removesuffix(".mask").removesuffix(".kept")
