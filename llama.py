"""
A Hugging Face folder <-> a Llama, bit for bit: checked loading, saving plain or packed.

Source    the layout of Hugging Face's transformers and safetensors; the packed form is this
          project's own.
Reading   4 of 9. Before: model.py. Next: eval.py. Beside it: tokenizer.py.
Shapes    W (d_out, d_in); packed: mask (d_out, ceil(d_in / 8)) uint8, values (count,).
Not here  quantised weights, pickled weights: only safetensors and JSON are read.

Laptop    python llama.py --prompt "import os" --tokens 64              (2 s; the text streams)
Full      python llama.py --model ~/Llama-2-7b-hf --prompt "..." --temperature 0.8
"""

import itertools
import json
import math
import os
import shutil
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model import Config, Llama, generate
from script import (
    KEPT_FILES,
    Parser,
    Refused,
    a_seed,
    add_model,
    choose_device,
    first_line,
    read_json,
    refuse_pointer,
    run,
    send,
    usual_mode,
)
from tokenizer import Tokenizer

LEAST_KEPT = 0.05  # of a packed matrix: strategies leave a tenth; a file of masks alone is a trap
FLOATS = ("F16", "BF16", "F32")  # the dtypes of weights that are read, as safetensors names them
SAVE_AGAIN = (
    "write it again, by AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
    " of transformers"
)
# weights in other forms -> what to do
UNREAD = dict.fromkeys((".bin", ".pt", ".pth"), f"pickled weights are not read; {SAVE_AGAIN}")
UNREAD[".gguf"] = "get the model's folder in Hugging Face's layout, not its conversion"


# ------------------------------------------------------------------------------ packed matrices
def pack(W, kept):
    """One bit for each weight, and the survivors: W (d_out, d_in) where `kept` holds -> (mask,
    values).

    The packed layout, version 1: packed.safetensors has the metadata `unicuco_packed: 1`. The name,
    packed-....safetensors and packed.safetensors.index.json for shards, keeps other tools from
    taking the folder for a plain one with half of its weights missing. A pruned matrix NAME is
    stored as
    NAME.mask   uint8 (d_out, ceil(d_in / 8)), bit j % 8 of byte j // 8 set where column j
                survives, unused bits 0
    NAME.kept   the survivors row by row, in the source's dtype
    Everything else is stored as in the source, and an index keeps naming NAME. At sparsity s in
    float16 a matrix takes 1/16 + (1 - s) of its dense bytes.
    """
    values, count = survivors(W, kept)
    return bit_mask(kept), values[: int(count)]


def bit_mask(kept):
    bits = F.pad(kept, (0, -kept.shape[1] % 8)).view(len(kept), -1, 8)
    powers = 1 << torch.arange(8, device=kept.device)
    return (bits * powers).sum(-1, dtype=torch.uint8)


def survivors(W, kept):
    """W[kept] in front of a vector, and its length (0-dim); on CUDA the vector has room for all of
    W, because W[kept] would wait for the device to say how many there are.
    """
    if not W.is_cuda:
        values = W[kept]
        return values, torch.tensor(len(values))
    kept = kept.flatten()
    place = kept.cumsum(0).mul_(kept)  # 0, in front of the values, where nothing is kept
    room = W.new_empty(len(place) + 1).scatter_(0, place, W.flatten())
    return room[1:], kept.sum()


def unpack(mask, values, d_in, name=""):
    """The inverse of `pack`, +0.0 where nothing was kept; Refused when mask and values do not fit
    together.
    """
    check_packed(mask, values, d_in, name)
    return expand(mask, values, d_in)


def bits_of_bytes(device):
    """(256, 8) bool: bit j of every byte."""
    columns = torch.arange(8, device=device)
    return (torch.arange(256, device=device)[:, None] >> columns & 1).bool()


def check_packed(mask, values, d_in, name):
    """Refused unless the mask keeps as many weights as there are values, and no unused bit is set.
    Where both are read, so that no device has to be waited for.
    """
    counts = bits_of_bytes(mask.device).sum(1, dtype=torch.int32)
    count = int(counts.index_select(0, mask.flatten().int()).sum())
    if count != len(values) or (d_in % 8 and (mask[:, -1] >> d_in % 8).any()):
        raise Refused(
            f"packed tensor {name} keeps {count} weights, but {len(values)} values are there"
        )


def expand(mask, values, d_in):
    """W (d_out, d_in) of a mask and values that fit together, where they are."""
    kept = bits_of_bytes(mask.device).index_select(0, mask.flatten().int())
    kept = kept.view(len(mask), -1)[:, :d_in].flatten()
    place = kept.cumsum(0, dtype=torch.int32)
    place.mul_(kept)  # 0 where nothing is kept: the zero in front of the values
    return torch.cat([values.new_zeros(1), values]).index_select(0, place).view(len(mask), d_in)


def dense_name(name):
    """The parameter that a stored tensor belongs to: NAME.mask and NAME.kept are the packed form of
    NAME.
    """
    return name.removesuffix(".mask").removesuffix(".kept")


# -------------------------------------------------------------------------------------- reading
def open_weights(path):
    try:
        f = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path} is not a readable safetensors file: {first_line(error)}") from None
    if (f.metadata() or {}).get("unicuco_packed", "1") != "1":
        raise Refused(f"{path} is packed in a version that this code does not read")
    return f


def read_index(index):
    """{tensor: file name} of model.safetensors.index.json; Refused unless every file lies in the
    index's own folder.
    """
    promised = read_json(index).get("weight_map")
    if isinstance(promised, dict) and all(map(plain_file_name, promised.values())):
        return promised
    raise Refused(f"{index}: weight_map does not map tensor names to files of this folder")


def plain_file_name(name):
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name.endswith(".safetensors")
        and name.isprintable()
    )


def weight_files(folder):
    """{file: {tensor: (shape, dtype)}} of a checkpoint folder, weights unread; Refused where index
    and shards disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Refused(
            f"{folder} is not a folder (a model is a folder with config.json, model.safetensors"
            " and a tokenizer)"
        )
    for path in folder.glob("*"):
        # opening a pipe would wait for ever
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise Refused(f"{path} is neither a file nor a folder")
        refuse_pointer(path)
    listed = weights_of(folder)
    refuse_link_out(listed, folder)
    promised = None if listed.suffix == ".safetensors" else read_index(listed)
    paths = [listed] if promised is None else sorted({folder / name for name in promised.values()})
    files = {}
    for path in paths:
        refuse_link_out(path, folder)
        files[path] = read_header(path)
        if promised is not None:
            check_promise(path, files[path], promised)
    return files


def check_promise(path, tensors, promised):
    """Refused where a shard and the index, {tensor: file name}, disagree about what is in it."""
    owned = {name for name, file in promised.items() if file == path.name}
    wrong = set(map(dense_name, tensors)) ^ owned
    # indices list these though no file has them; a head that is needed is missed later
    wrong = {n for n in wrong if not n.endswith(("rotary_emb.inv_freq", "lm_head.weight"))}
    if wrong:
        raise Refused(f"{path} and the index disagree about the tensor {min(wrong)!r:.200}")


def refuse_link_out(path, folder):
    """Refuse a file of a model folder that is a link out of it: a stranger's folder must not carry
    your files into what you publish. The hub's own cache, models--NAME/snapshots/HASH, which links
    every file to models--NAME/blobs, is no stranger.
    """
    home = Path(os.path.realpath(folder))  # as it is, a ring of links raises nothing
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    real = Path(os.path.realpath(path))
    if not any(place in real.parents for place in (home, *blobs)):
        raise Refused(f"{path} is a link out of its folder: copy the file itself to that place")


def weights_of(folder):
    """The weight file of a folder or, where it has shards, their index. A whole file goes before an
    index, which can be left from before a merge, as in transformers.
    """
    for stem, kind in itertools.product(("model", "packed"), ("", ".index.json")):
        path = folder / f"{stem}.safetensors{kind}"
        if path.exists():
            return path
    for path in sorted(folder.glob("*")):
        if path.suffix in UNREAD:
            raise Refused(f"{folder} holds {path.name} and no safetensors: {UNREAD[path.suffix]}")
    raise Refused(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")


def weight_name(name, packed):
    """The name of a weight file or its index in a plain or a packed folder, from that in either."""
    rest = name.removeprefix("model").removeprefix("packed")
    return ("packed" if packed else "model") + (rest if rest != name else "-" + name)


def read_header(path):
    """{tensor: (shape, dtype)} of one file."""
    with open_weights(path) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def stored_dtypes(folder):
    """{parameter name: torch dtype} of a checkpoint folder's weights, packed ones too."""
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    stored = [tensor for tensors in weight_files(folder).values() for tensor in tensors.items()]
    return {dense_name(name): dtypes[dtype] for name, (_, dtype) in stored if dtype in dtypes}


def check_tensors(folder, files, expected):
    """Compare headers with expected {name: shape}, before anything is allocated; Refused, by name,
    for a tensor that is missing, unknown, there twice or in half.
    """
    missing = set(expected)
    for path, tensors in files.items():
        for name, (shape, dtype) in tensors.items():
            if name.endswith("rotary_emb.inv_freq") and dtype in FLOATS:
                continue  # old Llama 2 files carry it; it is computed here
            owner = dense_name(name)
            halved = owner != name and not {owner + ".mask", owner + ".kept"} <= tensors.keys()
            packed_vector = owner != name and len(expected.get(owner, ())) != 2
            twice = owner not in missing and not name.endswith(".kept")
            if owner not in expected or halved or packed_vector or twice:
                raise Refused(
                    f"{path}: tensor {name!r:.200} does not belong to this model, or is there"
                    " twice or in half"
                )
            check_tensor(path, name, shape, dtype, expected[owner])
            if not name.endswith(".kept"):
                missing -= {owner}
    if missing:
        raise Refused(f"{folder}: tensor {min(missing)} is missing")


def check_tensor(path, name, shape, dtype, right):
    """Refuse a tensor whose shape or dtype is not that of the model's parameter, of shape `right`,
    or of its packed form.
    """
    dtypes = FLOATS
    if name.endswith(".mask"):
        right, dtypes = (right[0], -(-right[-1] // 8)), ("U8",)
    elif name.endswith(".kept"):
        if shape[0] < LEAST_KEPT * math.prod(right):  # before anything is allocated for it
            raise Refused(f"{path}: {name} keeps {shape[0]} weights, less than pruning leaves")
        right = shape[:1]
    if shape != right or dtype not in dtypes:
        raise Refused(
            f"{path}: tensor {name} has shape {shape!s:.60} and dtype {dtype}, not {right} and"
            f" {' or '.join(dtypes)}"
        )


def read_tensors(path, names, d_in, device=torch.device("cpu")):
    """Yield (name, tensor) of the file `path` on `device`, as stored (on the CPU memory-mapped),
    packed matrices unpacked there; d_in: {name: columns}.
    """
    with open_weights(path) as f:
        for name in names:
            owner = dense_name(name)
            if name.endswith(".mask"):
                mask, values = f.get_tensor(name), f.get_tensor(owner + ".kept")
                check_packed(mask, values, d_in[owner], name)
                yield owner, expand(send(mask, device), send(values, device), d_in[owner])
            elif not name.endswith(".kept"):
                yield name, send(f.get_tensor(name), device)


def empty_llama(folder, files):
    """A Llama of the folder's config.json without memory for its weights, after its headers were
    checked against it.
    """
    config = Config.read(folder / "config.json")
    stored = sum(map(len, files.values()))
    if config.num_hidden_layers * 9 > stored:
        raise Refused(
            f"{folder} has {stored} tensors, too few for {config.num_hidden_layers} blocks"
        )
    with torch.device("meta"):
        model = Llama(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    copied = any("lm_head.weight" in tensors for tensors in files.values())
    # some tied checkpoints carry the copy, most do not
    if config.tie_word_embeddings and not copied:
        del expected["lm_head.weight"]
    check_tensors(folder, files, expected)
    return model


def load_llama(path, device="cpu", dtype=torch.float32):
    """Read a Hugging Face folder -> (Llama, Tokenizer), weights sent to `device` as they are stored
    and cast to `dtype` there, one tensor at a time.

    The folder holds config.json; model.safetensors, or shards with an index, plain or packed; and
    tokenizer.model or tokenizer.json. Refused, in one line, whatever does not fit: a missing, extra
    or misshapen tensor is named.
    """
    folder, device = Path(path), torch.device(device)
    files = weight_files(folder)
    model = empty_llama(folder, files)
    tokenizer = Tokenizer(folder, model.config.vocab_size)
    columns = {name: p.shape[-1] for name, p in model.state_dict().items()}
    mapped = device.type == "cpu"  # from the file, which the model must not hold
    for file, names in files.items():
        ends = {}
        for name, tensor in read_tensors(file, names, columns, device):
            if name not in columns:
                continue
            # NaN goes through both; nothing is allocated
            ends[name] = torch.stack(tensor.aminmax()).float()
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(dtype, copy=mapped), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, parameter)
            del tensor  # the last one would keep the whole shard in memory
        check_finite(file, ends)
    if model.config.tie_word_embeddings:
        tie_head(model)
    return model.eval(), tokenizer


def tie_head(model):
    """The embeddings are the head too, unless another head is stored: that one is used, as by
    transformers, whatever config.json says.
    """
    embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
    if head.is_meta or torch.equal(head, embeddings):
        model.lm_head.weight = embeddings


def check_finite(file, ends):
    """Refused when a tensor's least or largest weight is not finite; ends: {name: (2,) float32},
    read at once.
    """
    for name, pair in zip(ends, torch.stack(list(ends.values())).tolist() if ends else ()):
        if not all(map(math.isfinite, pair)):
            raise Refused(f"{file}: tensor {name} holds NaN or infinite weights")


# -------------------------------------------------------------------------------------- writing
def surviving(live, value):
    """Without masks: what is +0.0 in the live weights and not 0 in the source's `value` is pruned
    -> (d_out, d_in) bool.
    """
    live = live.detach()
    return (live != 0) | live.signbit() | (value.to(live.dtype) == 0)


def pruned_tensors(path, names, live, masks, values, packed):
    """{stored name: tensor} of one source file, pruned: values are the file's own, in its dtype.

    Where the masks are; on CUDA with one wait, for all of them are copied into pinned memory.
    """
    tensors, counts, device = {}, {}, next(iter(live.values())).device
    # into pinned memory: TensorConversions.cpp, pin_out
    back = lambda tensor: tensor.to("cpu", non_blocking=True)
    for name, value in read_tensors(path, names, {n: p.shape[-1] for n, p in live.items()}):
        value = values.get(name, value)
        kept = None if masks is None else masks.get(name)
        if masks is None and name.endswith("_proj.weight"):
            value = send(value, live[name].device)
            kept = surviving(live[name], value)
        if kept is None:
            tensors[name] = value
            continue
        value = value if value.device == kept.device else send(value, kept.device)
        if packed:
            parts = bit_mask(kept), *survivors(value, kept)
            tensors[name + ".mask"], tensors[name + ".kept"], counts[name] = map(back, parts)
        else:
            tensors[name] = back(value.where(kept, value.new_zeros(())))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    for name, count in counts.items():
        tensors[name + ".kept"] = tensors[name + ".kept"][: int(count)]
    return tensors


def files_to_copy(source):
    """Files of a model folder that go into every pruned copy as they are: those of KEPT_FILES, none
    of them a link out of it.
    """
    files = [source / name for name in KEPT_FILES if (source / name).is_file()]
    for path in files:
        refuse_link_out(path, source)
    return files


def save_llama(model, folder, source, masks=None, packed=False, values=None):
    """Write `model` in the layout of the folder `source`, tokenizer files included, loadable by
    transformers unchanged.

    Values come from the source's files in the source's dtype, tensor by tensor: a surviving weight
    is bit-identical to the source's, a pruned one is +0.0, whatever dtype was computed in.
    masks     {parameter name: bool (d_out, d_in), True = kept}; None: what is +0.0 in the model and
              not in the source is pruned
    values    {parameter name: (d_out, d_in)} refitted weights, in the source's dtype, that replace
              its
    packed    pruned matrices as NAME.mask and NAME.kept, see `pack`: load_llama reads it, other
              tools do not
    """
    folder, source = Path(folder), Path(source)
    if folder.resolve() == source.resolve():
        raise Refused(f"{folder} cannot be written while it is read: save to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    live = dict(model.named_parameters())
    # one key: the order of two would change from run to run
    metadata = {"unicuco_packed": "1"} if packed else {"format": "pt"}
    for path, names in weight_files(source).items():
        tensors = pruned_tensors(path, names, live, masks, values or {}, packed)
        file = folder / weight_name(path.name, packed)
        save_file(tensors, file, metadata)
        usual_mode(file)
    copy_index(weights_of(source), folder, packed)
    for path in files_to_copy(source):
        shutil.copyfile(path, folder / path.name)


def copy_index(listed, folder, packed):
    """Where the source's weights are listed by an index, write it to `folder` with the files' new
    names.
    """
    if listed.suffix == ".safetensors":
        return
    index = read_json(listed)
    files = {tensor: weight_name(name, packed) for tensor, name in index["weight_map"].items()}
    text = json.dumps(index | {"weight_map": files}, indent=2)
    (folder / weight_name(listed.name, packed)).write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------- command line
def stream(model, tokenizer, prompt, count, temperature=0.0, seed=0):
    """Yield the text that follows `prompt`, piece by piece, whole characters only; ends at an
    end-of-text token.
    """
    ids = [tokenizer.bos_id] * tokenizer.adds_bos + tokenizer.encode(prompt)
    shown = len(tokenizer.decode(ids))
    for token in generate(model, ids or [tokenizer.bos_id or 0], count, temperature, seed):
        if token in tokenizer.eos_ids:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        # half of a multi-byte character waits for the rest
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)


def show_side_by_side(args, device, dtype):
    """What the two models of --compare write after the same prompt, in two columns."""
    columns = []
    width = max(shutil.get_terminal_size().columns // 2 - 2, 20)
    for folder in args.compare:
        pieces = stream(
            *load_llama(folder, device, dtype),
            args.prompt,
            args.tokens,
            args.temperature,
            args.seed,
        )
        lines = (args.prompt + "".join(pieces)).splitlines()
        wrapped = [textwrap.wrap(line, width, drop_whitespace=False) or [""] for line in lines]
        columns.append([str(folder), "", *itertools.chain(*wrapped)])
    for left, right in itertools.zip_longest(*columns, fillvalue=""):
        print(f"{left:<{width}} | {right}".rstrip())


def arguments():
    examples = [
        'python llama.py --prompt "import os"',
        'python llama.py --model DIR --prompt "Once" --temperature 0.8 --seed 1',
        'python llama.py --compare tiny out/tiny-0.5 --prompt "def main():"',
    ]
    parser = Parser(__doc__, examples)
    add_model(parser)
    parser.add_argument("--prompt", default="import os\n", help="text to go on from")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--tokens", **number, default=64, help="how many tokens to write")
    likeliest = "0 takes the likeliest token"
    parser.add_argument("--temperature", type=float, default=0.0, help=likeliest)
    parser.add_argument("--seed", type=a_seed, default=0, help="of the draws")
    two = {"type": Path, "nargs": 2, "metavar": "DIR"}
    parser.add_argument("--compare", **two, help="show what two models write, side by side")
    args = parser.parse_args()
    if args.tokens < 1 or not args.temperature >= 0:
        raise Refused("--tokens must be at least 1 and --temperature at least 0")
    return args


def main():
    args = arguments()
    device, dtype, reason = choose_device(args.device, args.dtype)
    if args.compare:
        return show_side_by_side(args, device, dtype)
    model, tokenizer = load_llama(args.model, device, dtype)
    print(f"{device}, {str(dtype)[6:]} ({reason})", file=sys.stderr)
    print(args.prompt, end="")
    for piece in stream(model, tokenizer, args.prompt, args.tokens, args.temperature, args.seed):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)
