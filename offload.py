"""
Models larger than the GPU: the blocks stay in host memory and pass through it, two at a time.

Reading   beside llama.py. Next: prune.py, whose --offload, and that of train.py, uses it. Imports
          nothing from this folder.
"""

import copy

import torch


def offload_blocks(model, device):
    """Keep the blocks of `model` (in host memory) there, everything else on `device`; the model
    computes on `device` as before.
    """
    blocks, model.model.layers = model.model.layers, torch.nn.ModuleList()
    model.to(device).model.layers = Offloaded(blocks, torch.device(device))


class Offloaded(torch.nn.ModuleList):
    """Blocks whose weights stay in host memory; iterating yields each on `device`, the next copied
    while this one computes.

    Two blocks at most are on the device. Indexing gives the blocks in host memory, as do
    named_parameters and state_dict.
    """

    def __init__(self, blocks, device):
        super().__init__(blocks)
        self.device = device
        self.rooms = [
            (copy.deepcopy(blocks[0]).to(device),) for _ in range(2)
        ]  # in tuples: not part of the model
        if device.type == "cuda":  # pragma: no cover (needs CUDA)
            for p in self.parameters():
                p.data = p.data.pin_memory()

    def __iter__(self):
        cuda = self.device.type == "cuda"
        side = torch.cuda.Stream(self.device) if cuda else None

        def fetch(i):
            (room,) = self.rooms[i % 2]
            if cuda:  # pragma: no cover (the room is free once block i - 2 has computed)
                side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for here, there in zip(room.parameters(), self[i].parameters()):
                    here.data.copy_(there.data, non_blocking=True)
            return room

        following = fetch(0)
        for i in range(len(self)):
            room = following
            if cuda:  # pragma: no cover
                torch.cuda.current_stream(self.device).wait_stream(side)
            if i + 1 < len(self) and cuda:  # pragma: no cover
                following = fetch(i + 1)
            yield room
            if i + 1 < len(self) and not cuda:
                following = fetch(i + 1)
