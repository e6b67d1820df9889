"""
A CUDA device made of CPU tensors: the CUDA paths run, under CUDA's rules, where there is no GPU.

Reading   beside conftest.py; test_cuda.py uses it. Nothing of the product does.
How       `Sim` is a tensor that says cuda:0 and holds a CPU tensor; `Device` is a dispatch mode
          that runs every operator on what is held, and `Calls` turns what a driver would be asked
          for (.to, device=, .cpu(), pin_memory) into Sims. So numbers are the CPU's, bit for bit.
Refused   tensors of two devices in one operator, but for 0-dim CPU tensors in elementwise ones and
          CPU indices; .numpy() and data_ptr of a device tensor; pinning one; more memory than set.
Counted   in each phase (`log.at`): kernels (operators that run one), their bytes and FLOPs, copies
          each way, waits of the host, and the most bytes held. `values=False` keeps shapes alone.
Races     the host and every stream have a vector clock, {thread: time}. Of pinned memory, and of
          device memory that a side stream touched, every access must be ordered after earlier
          conflicting ones, by wait_stream or a wait of the host.
Not seen  what real kernels compute and how fast, their missing dtypes, cuBLAS, the allocator.
"""

import contextlib
import functools
import itertools
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
HOST_READS = {"_local_scalar_dense", "equal", "is_nonzero", "item"}
# operators whose result has a size that the host must be told
SIZE_READS = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim"}
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh"}
FREE |= {"detach", "_reshape_alias", "_unsafe_view", "set_", "resize_", "result_type"}
MEETS_CPU_SCALARS = {"where", "index_put_", "masked_fill_", "masked_fill", "fill_", "copy_"}
MEETS_CPU_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}
OUT_OF_MEMORY = "CUDA out of memory (simulated): {held} bytes are held, {limit} are there"


class Mismatch(RuntimeError):
    """What CUDA would have refused."""


# ------------------------------------------------------------------------------ streams and races
class Stream:
    """torch.cuda.Stream: a thread with a vector clock."""

    names = itertools.count()

    def __init__(self, device=None, name=None):
        self.clock, self.name = {}, name or f"side {next(self.names)}"

    def wait_stream(self, other):
        join(self.clock, other.clock)

    def synchronize(self):
        NOW.log.wait("synchronize", self)


# what is simulated at present: see `simulated`
NOW = SimpleNamespace(log=None, device=None, streams=[], host=None, watched={}, held={}, pinned={})


def join(clock, other):
    for thread, time in other.items():
        clock[thread] = max(clock.get(thread, 0), time)


class Watch:
    """What was done to one storage: the last write and the reads since, each (thread, time, op)."""

    def __init__(self, kind, keep):
        self.kind, self.keep, self.write, self.reads = kind, keep, None, []


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def watch(tensor, kind):
    return NOW.watched.setdefault(storage_of(tensor), Watch(kind, tensor))


def access(stream, reads, writes, op):
    """An operator on `stream`, or on the host: report what nothing orders after an earlier access
    that conflicts with it.
    """
    written = {storage_of(t) for t in writes} & NOW.watched.keys()
    read = ({storage_of(t) for t in reads} & NOW.watched.keys()) - written
    if not read | written:
        return
    if stream is not NOW.host:  # a launch comes after whatever the host did before
        join(stream.clock, NOW.host.clock)
    stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
    now = stream.name, stream.clock[stream.name], f"{op} at {site()}"
    for key in read:
        check_order(stream, now, NOW.watched[key], [NOW.watched[key].write])
        NOW.watched[key].reads.append(now)
    for key in written:
        seen = NOW.watched[key]
        check_order(stream, now, seen, [seen.write, *seen.reads])
        seen.write, seen.reads = now, []


def check_order(stream, now, seen, earlier):
    for before in earlier:
        if before and stream.clock.get(before[0], 0) < before[1]:
            NOW.log.races[f"{seen.kind}: {now[0]}, {now[2]}, after {before[0]}, {before[2]}"] += 1


# ------------------------------------------------------------------------------------------- log
@functools.cache
def is_product(file):
    path = Path(file)
    own = path.parent == Path(__file__).parent and path.name != Path(__file__).name
    return own and not path.name.startswith(("test_", "conftest"))


def site():
    """file:line of the innermost frame that belongs to the product."""
    frame = sys._getframe(1)
    while frame is not None and not is_product(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


class Log:
    """counts[phase][kind], of kinds waits, kernels, bytes, flops, to device, to host; peaks[phase]
    bytes; waits {(phase, op, file:line): times}; races {sentence: times}.
    """

    def __init__(self, limit):
        self.limit, self.held, self.phases = limit, 0, ["start"]
        self.counts, self.peaks = {"start": Counter()}, Counter()
        self.waits, self.races = Counter(), Counter()
        self.sizes = Counter()  # bytes on each device

    def add(self, **amounts):
        self.counts[self.phases[-1]].update(amounts)

    def wait(self, op, stream):
        """The host waits for `stream`: what that did is known from here on."""
        join(NOW.host.clock, stream.clock)
        self.add(waits=1)
        self.waits[self.phases[-1], op, site()] += 1

    def hold(self, size, device):
        self.held += size
        self.sizes[str(device)] += size
        for phase in self.phases:
            self.peaks[phase] = max(self.peaks[phase], self.held)
        if self.limit is not None and self.held > self.limit:
            message = OUT_OF_MEMORY.format(held=self.held, limit=self.limit)
            raise torch.cuda.OutOfMemoryError(message)

    @contextlib.contextmanager
    def at(self, phase):
        self.phases.append(phase)
        self.counts.setdefault(phase, Counter())
        self.peaks[phase] = max(self.peaks[phase], self.held)
        try:
            yield
        finally:
            self.phases.pop()


# ---------------------------------------------------------------------------------------- tensors
class Sim(torch.Tensor):
    """A tensor on `place`, a CUDA device; `elem` holds its values, or its shape alone."""

    @staticmethod
    def __new__(cls, elem, place):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device="cpu",  # to C++, which would look for a driver otherwise
        )

    def __init__(self, elem, place):
        self.elem, self.place = elem, place
        key = storage_of(elem)
        users = NOW.held.setdefault(key, [0, elem.untyped_storage().nbytes()])
        users[0] += 1
        weakref.finalize(self, release, NOW.held, key, place, NOW.log)
        if users[0] == 1:
            NOW.log.hold(users[1], place)

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NOW.device.__torch_dispatch__(func, types, args, kwargs)


def release(held, key, place, log):
    held[key][0] -= 1
    if held[key][0] == 0:
        log.held -= held[key][1]
        log.sizes[str(place)] -= held.pop(key)[1]


def held(value):
    return value.elem if isinstance(value, Sim) else value


def on_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def indexed(device):
    """cuda is the current device."""
    device = torch.device(device)
    return torch.device("cuda", NOW.device.current if device.index is None else device.index)


@contextlib.contextmanager
def unwatched():
    """Operators on what Sims hold. Not in inference mode, whose tensors cannot be views of
    others.
    """
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def span(tensor):
    """Bytes that a kernel touches: a broadcast dimension counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride)
    return functools.reduce(lambda a, b: a * b, sizes, tensor.element_size())


# ------------------------------------------------------------------------------------- operators
@functools.cache
def is_view(func):
    returned = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return any(not alias.is_write for alias in returned)


def written_by(func, args, kwargs):
    """The tensors among its arguments that an operator writes."""
    named = [(i, a.name) for i, a in enumerate(func._schema.arguments) if writes(a)]
    values = [kwargs.get(name, args[i] if i < len(args) else None) for i, name in named]
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def writes(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def flops(name, args, out):
    """Of the matrix products; every other operator counts none."""
    if name in ("mm", "bmm", "linear", "matmul"):
        return 2 * out.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * out.numel() * args[1].shape[-1]
    if name.startswith(("scaled_dot_product", "_scaled_dot_product")) and "backward" not in name:
        T, S = args[0].shape[-2], args[1].shape[-2]
        # causal: half of the pairs
        return 4 * args[0].numel() * S // (2 if T == S and T > 1 else 1)
    return 0


class Device(TorchDispatchMode):
    """Runs every operator: of CPU tensors as ever, of Sims on what they hold."""

    def __init__(self, values, answer):
        super().__init__()
        self.values, self.answer, self.current = values, answer, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(isinstance(t, torch.sparse.SparseSemiStructuredTensor) for t in tensors):
            return NotImplemented  # dispatches by itself, then comes back with what it holds
        sims = [t for t in tensors if isinstance(t, Sim)]
        if sims:
            return self.run(func, args, kwargs, tensors, sims)
        out = func(*args, **kwargs)
        if NOW.watched and not is_view(func) and func.overloadpacket.__name__ not in FREE:
            access(NOW.host, tensors, written_by(func, args, kwargs), func)
        return out

    def run(self, func, args, kwargs, tensors, sims):
        name = func.overloadpacket.__name__
        if name == "copy_" and len({t.device for t in args[:2]}) > 1:
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            return transfer(args[1], args[0], waits)
        self.check(func, name, tensors)
        indices = args[1] if name == "index" else []
        if name in SIZE_READS | HOST_READS or any(map(is_mask, indices)):
            NOW.log.wait(name, NOW.streams[-1])
        if name in HOST_READS and not self.values:
            return sims[0].dtype == torch.bool or self.answer
        with unwatched():
            plain, named = tree_map(held, (args, kwargs))
            if not self.values:
                plain, named = tree_map(shape_alone, (plain, named))
            out = two_in_four(name, plain)
            if out is None:
                out = func(*plain, **named)
            known = {id(t.elem): t for t in sims}
            result = tree_map(lambda o: self.lift(o, known, sims[0].place), out)
        if not (name in FREE | HOST_READS or is_view(func)):
            self.count(func, name, plain, out, sims, written_by(func, args, kwargs))
        return result

    def lift(self, value, known, place):
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else Sim(value, place)

    def count(self, func, name, plain, out, sims, written):
        produced = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        read = [t.elem for t in sims if name.endswith("_") or all(t is not w for w in written)]
        work = flops(name, plain, out)
        NOW.log.add(kernels=1, bytes=sum(map(span, read + produced)), flops=work)
        stream = NOW.streams[-1]
        if len(NOW.streams) > 1:
            for t in [*(s.elem for s in sims), *produced]:
                watch(t, "device memory")
        access(stream, read, [w.elem for w in written if isinstance(w, Sim)] + produced, func)

    def check(self, func, name, tensors):
        """CUDA's rule: one device. A 0-dim CPU tensor may join an elementwise operator, CPU indices
        an indexing one.
        """
        scalars = [t for t in tensors if t.ndim == 0 and t.device.type == "cpu"]
        if torch.Tag.pointwise in func.tags or name in MEETS_CPU_SCALARS:
            tensors = [t for t in tensors if all(t is not s for s in scalars)]
        if name in MEETS_CPU_INDICES and tensors[0].device.type == "cuda":
            tensors = [t for t in tensors if t.device.type == "cuda"]
        places = {str(t.device) for t in tensors}
        if len(places) > 1:
            raise Mismatch(f"{func}: tensors on {', '.join(sorted(places))} at {site()}")


def is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def shape_alone(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def two_in_four(name, args):
    """The 2:4 kernels by their dense meaning: what is packed stays dense here. None: another
    operator.
    """
    if name == "_cslt_compress":
        W = args[0]
        if any(n % 16 for n in W.shape) or W.dtype not in (torch.float16, torch.bfloat16):
            raise Mismatch(f"_cslt_compress of {W.dtype}, {tuple(W.shape)} at {site()}")
        if (W.view(-1, 4) != 0).sum(1).max() > 2:
            raise Mismatch(f"_cslt_compress without the pattern 2:4 at {site()}")
        return W.clone()
    if name == "cusparselt_mm":
        dense, packed, bias, _, _, _, turns, _, dense_turned = args
        out = packed @ (dense.t() if dense_turned else dense)
        out = (out.t() if turns else out).contiguous()
        return out if bias is None else out + bias
    return None


# --------------------------------------------------------------------- between host and device
def transfer(source, target, waits):
    """Copy between devices into `target`; the host waits, unless told not to and its memory is
    pinned.
    """
    stream, down = NOW.streams[-1], isinstance(source, Sim)
    host = target if down else source
    if NOW.device.values:
        with contextlib.nullcontext() if down else unwatched():
            aten.copy_(held(target), held(source))
    size = target.numel() * target.element_size()
    NOW.log.add(**{"to host" if down else "to device": size})
    if not down and len(NOW.streams) > 1:
        watch(target.elem, "device memory")
    access(stream, [held(source)], [held(target)], "copy")
    if waits or storage_of(host) not in NOW.pinned:
        NOW.log.wait("copy to host" if down else "copy to device", stream)
    return target


def room_for_none(like):
    """A shape alone, of host memory: one number, and a storage of its own."""
    return torch.full((), NOW.device.answer).to(like.dtype).expand(like.shape)


def pin(tensor):
    if isinstance(tensor, Sim):
        raise Mismatch(f"only CPU tensors can be pinned, at {site()}")
    pinned = tensor.detach().clone() if NOW.device.values else room_for_none(tensor)
    NOW.pinned[storage_of(pinned)] = pinned
    watch(pinned, "pinned memory")
    return pinned


def send(source, device, no_wait):
    """CPU tensor -> Sim."""
    with unwatched():
        store = "cpu" if NOW.device.values else "meta"
        target = Sim(torch.empty_like(source, device=store), indexed(device))
    return transfer(source, target, not no_wait)


def fetch(sim, dtype, no_wait):
    """Sim -> CPU tensor, in pinned memory when nobody waits, as torch has it."""
    if NOW.device.values:
        target = torch.empty(sim.shape, dtype=dtype)
    else:
        target = room_for_none(sim.elem.to(dtype))
    return transfer(sim.to(dtype), pin(target) if no_wait else target, not no_wait)


def to(tensor, *args, copy=False, **kwargs):
    """Tensor.to: a transfer where the device changes, else as ever. The host casts what it sends,
    the device what it gives away.
    """
    if args and isinstance(args[0], torch.Tensor):
        device, dtype, no_wait = args[0].device, args[0].dtype, False
    else:
        device, dtype, no_wait, _ = torch._C._nn._parse_to(*args, **kwargs)
    device = indexed(device) if on_cuda(device) else device or tensor.device
    dtype = dtype or tensor.dtype
    if device == tensor.device:
        return torch.Tensor.to(tensor, dtype=dtype, copy=copy)
    if device.type == "cuda":
        assert not isinstance(tensor, Sim), "from one GPU to another: not simulated"
        return send(tensor.detach().to(dtype), device, no_wait)
    if isinstance(tensor, Sim):
        return fetch(tensor.detach(), dtype, no_wait)
    return torch.Tensor.to(tensor, device, dtype, copy=copy)


def scalar(kind):
    """float(t), int(t), bool(t), t.item(): the host waits for a value."""
    return lambda tensor: kind(aten._local_scalar_dense.default(tensor))


def refuse(tensor, *args, **kwargs):
    raise Mismatch(f"the host cannot read memory of the device, at {site()}")


OF_SIMS = {"numpy": refuse, "data_ptr": refuse, "item": scalar(lambda value: value)}
OF_SIMS |= {"tolist": lambda t: to(t, "cpu").tolist(), "cpu": lambda t: to(t, "cpu")}
OF_SIMS |= {"__float__": scalar(float), "__int__": scalar(int), "__bool__": scalar(bool)}


class Calls(TorchFunctionMode):
    """What would be asked of a driver before any operator runs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and name in ("to", "pin_memory"):
            return {"to": to, "pin_memory": pin}[name](*args, **kwargs)
        if isinstance(first, Sim) and name in OF_SIMS:
            return OF_SIMS[name](*args, **kwargs)
        if name in ("data_ptr", "numpy"):  # of host memory: a reading that no operator shows
            access(NOW.host, [first], [], name)
        if on_cuda(kwargs.get("device")):
            return self.make(func, args, kwargs)
        return func(*args, **kwargs)

    def make(self, func, args, kwargs):
        """A tensor made on the device: filled by a kernel, or copied from numbers of the host."""
        device = indexed(kwargs.pop("device"))
        if isinstance(args[0] if args else None, Sim):  # zeros_like and its kind
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            return send(func(*args, **kwargs), device, no_wait=False)
        with unwatched():
            store = "cpu" if NOW.device.values else "meta"
            made = Sim(func(*args, **kwargs, device=store), device)
        if func is not torch.empty:
            NOW.log.add(kernels=1, bytes=span(made.elem))
        return made


# ------------------------------------------------------------------------------------ torch.cuda
@contextlib.contextmanager
def on_stream(stream):
    if stream is not None:
        NOW.streams.append(stream)
    try:
        yield
    finally:
        if stream is not None:
            NOW.streams.pop()


def fakes(main, devices, capability):
    """What torch.cuda says while a device is simulated."""

    def set_device(device):
        NOW.device.current = torch.device(device).index

    return {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: devices,
        "current_device": lambda: NOW.device.current,
        "set_device": set_device,
        "get_device_capability": lambda device=None: capability,
        "Stream": Stream,
        "stream": on_stream,
        "current_stream": lambda device=None: NOW.streams[-1],
        "synchronize": lambda device=None: main.synchronize(),
    }


@contextlib.contextmanager
def simulated(values=True, answer=0.0, devices=1, capability=(8, 0), limit=None):
    """Within, CUDA is there. Yields the Log.

    values   False: shapes alone, for models that do not fit; what the host reads is `answer`
    limit    bytes of memory of the device
    """
    main = Stream(name="main")
    fresh = SimpleNamespace(log=Log(limit), device=Device(values, answer), streams=[main])
    fresh.host = SimpleNamespace(name="host", clock={"host": 1})
    fresh.watched, fresh.held, fresh.pinned = {}, {}, {}
    # Module.to makes new parameters, of our type
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with patch.multiple(torch.cuda, **fakes(main, devices, capability)):
            with patch.dict(vars(NOW), vars(fresh)), Calls(), fresh.device:
                yield fresh.log
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
