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
        # in tuples: not part of the model
        self.rooms = [(copy.deepcopy(blocks[0]).to(device),) for _ in range(2)]
        if device.type == "cuda":
            for p in self.parameters():
                p.data = p.data.pin_memory()

    def __iter__(self):
        return self.passing(range(len(self)))

    def __reversed__(self):
        return self.passing(reversed(range(len(self))))

    def passing(self, order):
        """The blocks of `order`, one after the other, each in one of the two rooms in turn."""
        order = list(order)
        cuda = self.device.type == "cuda"
        side = torch.cuda.Stream(self.device) if cuda else None
        try:
            following = self.fetch(order[0], 0, side)
            for place in range(len(order)):
                room, last = following, place + 1 == len(order)
                if cuda:
                    torch.cuda.current_stream(self.device).wait_stream(side)
                    if not last:  # copied while this one computes
                        following = self.fetch(order[place + 1], place + 1, side)
                yield room
                if not (last or cuda):
                    following = self.fetch(order[place + 1], place + 1, side)
        finally:
            if cuda:  # whoever goes on may write the weights in host memory: nothing reads them now
                side.synchronize()

    def fetch(self, i, place, side):
        """Copy block i into a room, on the stream `side` if there is one."""
        (room,) = self.rooms[place % 2]
        if side is not None:  # the room is free once its last block has computed
            side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for here, there in zip(room.parameters(), self[i].parameters()):
                here.data.copy_(there.data, non_blocking=True)
        return room
