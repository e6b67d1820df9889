"""
Semi-structured masks, 2:4 or 4:8, which NVIDIA's sparse kernels can run: by the same ranks, in
whole blocks.

Reading   beside prune.py, whose --pattern uses it; can be skipped. Imports script.py alone.
"""

import math

from script import Refused


def group_mask(ranks, keep, group):
    """`keep` of every `group` neighbours in a row survive, those of highest rank: (d_out, d_in)
    bool.
    """
    r = ranks.view(len(ranks), -1, group)
    better_than = (r[..., None] > r[..., None, :]).sum(-1)
    return (better_than >= group - keep).flatten(1)


def pattern_masks(pruner, strategy, keep, group):
    """{parameter name: bool (d_out, d_in), True = kept} with a keep:group pattern in some blocks;
    the others stay dense.

    ceil(2 d s) blocks get the pattern, s the counted sparsity: those where it prunes most.
    Refused above half of the weights, and where d_in is no multiple of the group.
    """
    x = pruner.full(strategy).mean(1)
    chosen = math.ceil(2 * len(x) * pruner.sparsity(strategy) - 1e-9)
    if chosen > len(x) or (pruner.d_in % group).any():
        raise Refused(
            f"the pattern {keep}:{group} prunes half of a block at most, and needs rows of a"
            f" multiple of {group} weights"
        )
    masks = {}
    for i in x.argsort(descending=True, stable=True)[:chosen].tolist():
        for name, ranks in zip(pruner.names[i], pruner.ranks[i]):
            masks[name] = group_mask(ranks, keep, group)
    return masks
