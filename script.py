"""
What every command shares: options, devices, errors in one line, files that are complete or absent,
and a journal.

Reading   below all other files; can be skipped at first. Imports nothing from this folder.
Errors    bad input is `Refused`: one line on stderr that says what to do, exit code 2. Everything
          else keeps its traceback.
Files     are written beside their place and renamed, so that a full disk or a kill leaves the old
          one or none, never half.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


OUT_OF_MEMORY = (
    "the GPU's memory is too small: --offload of prune.py and train.py keeps the blocks in host"
    " memory"
)


# ------------------------------------------------------------------------------------ errors
GRACE = 2  # seconds for torchrun's first process to speak: it is killed when another one ends


class Refused(ValueError):
    """Bad input of the user: a message of one line that says what to do. A ValueError that is not
    one is a bug of ours.
    """


class Died(RuntimeError):
    """Another of torchrun's processes is gone, so this one cannot go on."""


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def fail(message):
    """One line on stderr, then the exit code of bad input."""
    with contextlib.suppress(BrokenPipeError):
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def open_streams():
    """A stream that was closed leads nowhere; a character that one cannot show becomes "?"."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # a stream whose file was exchanged below it
                stream.reconfigure(errors="replace")


def hush():
    """Nobody reads standard output any more: what follows is written to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line=""):
    """Print a line at once; a reader who has gone, as `head` does, ends no work."""
    try:
        # one write: print makes two of it where Python is unbuffered, as it is below torchrun, and
        # the line of another process comes between
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        hush()


def run(main, hint=""):
    """Run a script: bad input is one line and exit code 2, Ctrl-C one line with a hint and 130, a
    closed pipe no error.
    """
    open_streams()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        hush()
    except KeyboardInterrupt:
        print(f"\ninterrupted{hint}", file=sys.stderr)
        sys.exit(130)
    except Refused as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # torchrun's first process says the same
            time.sleep(GRACE)
            sys.exit(2)
        fail(error)
    except Died:  # pragma: no cover (in a process of its own, which ends here)
        print(f"a process of this run died{hint}", file=sys.stderr, flush=True)
        os._exit(1)  # the usual way out, gloo's own threads can abort
    except torch.cuda.OutOfMemoryError as error:
        fail(f"{OUT_OF_MEMORY} ({first_line(error)})")
    except (OSError, SafetensorError) as error:  # the second: a full disk while weights are written
        fail(error)


# ----------------------------------------------------------------------------------- options
class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written, and the default of every option that has one."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with examples first, defaults shown, and one line on stderr for a bad argument."""

    def __init__(self, doc, examples):
        super().__init__(
            description="\n  ".join(["examples:", *examples])
            + "\n\n"
            + doc.strip().split("\n\n")[0],
            usage="%(prog)s [options]",
            formatter_class=lambda prog: Help(prog, max_help_position=30, width=100),
        )

    def error(self, message):
        raise Refused(message) from None


def add_model(parser):
    """The options of every script that loads a model."""
    parser.add_argument(
        "--model", type=Path, default=TINY, metavar="DIR", help="Hugging Face folder"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda if there is one"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="compute dtype; auto: by device, printed",
    )


def add_texts(parser, tokens_help="tokens of one measurement of f2", windows=32):
    """The options of every script that calibrates on one text and measures on another."""
    file, number = {"type": Path, "metavar": "FILE"}, {"type": int, "metavar": "N"}
    chosen_on = "text to choose on (default: the embedded default text)"
    parser.add_argument("--data", **file, help=chosen_on)
    measured_on = "texts to measure on (default: held-out part of --data)"
    parser.add_argument("--test", **file, nargs="+", action="extend", help=measured_on)
    tokens_help += " (default: {cpu} on the CPU, {cuda} on a GPU)".format(**TOKENS)
    parser.add_argument("--tokens", **number, help=tokens_help)
    calibration = "calibration windows"
    if windows is None:
        calibration += " (default: 64, with --no-refit 32, or all that --data has)"
    parser.add_argument("--calibration", **number, default=windows, help=calibration)
    length = "window (default: the model's positions, at most 512)"
    parser.add_argument("--seqlen", **number, help=length)
    drawn = "of windows and of everything that is drawn"
    parser.add_argument("--seed", type=a_seed, default=0, help=drawn)


def a_seed(text):
    """The number of a --seed, 0 to 2^63 - 1: what torch and numpy both take."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 0 to 2^63 - 1")
    return int(text)


def at_least(args, minimum, *names):
    """Refuse an option below `minimum`; one that was not given is None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise Refused(f"--{name.replace('_', '-')} must be at least {minimum}")


def find_device(name):
    """The torch.device that --device names; cuda is the process's own GPU under torchrun, else the
    first. Nothing is allocated: every process of torchrun would do so on GPU 0.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Refused(f"--device {name}: {first_line(error)}") from None
    if device.type not in ("cpu", "cuda"):
        raise Refused(f"--device {name}: only cpu and cuda are known here")
    if device.type == "cpu":
        return device
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index >= count:
        raise Refused(f"--device {name}: this machine has {count} CUDA devices for this torch")
    torch.cuda.set_device(device)
    return device


def fast_dtype(device):
    """(dtype, why): the shortest that the device multiplies fast."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, ""
        return torch.float16, ", float16 as it has no bfloat16 units"
    able = getattr(torch.cpu, "get_capabilities", dict)()
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    why = f", bfloat16 units {'found' if fast else 'not found'}"
    return torch.bfloat16 if fast else torch.float32, why


def choose_device(device="auto", dtype="auto"):
    """(device, dtype, reason): CUDA if there is one, else the CPU; in bfloat16 where it multiplies
    that fast.
    """
    there = torch.cuda.is_available()
    reason = "as asked" if device != "auto" else "a GPU is there" if there else "no GPU"
    if device == "auto":
        device = "cuda" if there else "cpu"
    device = find_device(device)
    if dtype != "auto":
        return device, DTYPES[dtype], reason
    chosen, why = fast_dtype(device)
    return device, chosen, reason + why


TOKENS = {"cpu": 2048, "cuda": 16384}  # of one measurement: on a GPU they cost next to nothing


def choose_tokens(args, device, reason):
    """Fill in --tokens by device where it is not given; the reason for the device, and for this if
    it is not the CPU's.
    """
    if args.tokens is None:
        args.tokens = TOKENS[device.type]
        if device.type != "cpu":
            reason += f"; --tokens {args.tokens}, for measuring is cheap there"
    return reason


def choose(args):
    """(device, dtype, reason) of a script that measures; --tokens and --dtype of `args` become what
    was chosen."""
    device, dtype, reason = choose_device(args.device, args.dtype)
    reason = choose_tokens(args, device, reason)
    args.dtype = str(dtype)[6:]
    return device, dtype, reason


def send(tensor, device):
    """A tensor of host memory on `device`, in the order of what is launched there: the host does
    not wait.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def join_processes():
    """Under torchrun: join its processes. Whether this one is the first of all machines', which
    prints and writes what is not its own."""
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")  # a handful of numbers: nccl would hide a dead peer
    return os.environ.get("RANK", "0") == "0"


def together(act, *given):
    """act(*given), an exchange of all of torchrun's processes; Died when one of them is gone."""
    try:
        return act(*given)
    except RuntimeError as error:
        raise Died(first_line(error)) from None


def meet():
    """Under torchrun: wait until every process is here."""
    if dist.is_initialized():
        together(dist.barrier)


# ------------------------------------------------------------------------------------- files
def sha256(path):
    """Hexadecimal digest of a file, read a megabyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def file_digest(path):
    """`sha256` of a regular file; None where there is none: a pipe is empty once it was read."""
    return sha256(path) if path is not None and path.is_file() else None


def read_json(path):
    """The JSON object in the file `path`; Refused, naming the file, when there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is missing or not readable JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} holds no JSON object")
    return value


def refuse_pointer(path):
    """Refuse a file that a clone without git-lfs left in the place of the real one."""
    if path.is_file() and path.stat().st_size < 1024:
        if path.read_bytes().startswith(b"version https://git-lfs"):
            raise Refused(f"{path} is a git-lfs pointer, not the file: run git lfs pull there")


@contextlib.contextmanager
def replacing(path):
    """Yields a hidden neighbour of `path` to write to, renamed at the end: a reader sees the old
    file or the new one.
    """
    path = Path(path)
    owner = f"{socket.gethostname()}.{os.getpid()}"  # machines can share a folder
    partial = path.with_name(f".{path.stem}.{owner}.partial{path.suffix}")
    try:
        yield partial
        usual_mode(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def usual_mode(path):
    """Give a file the permissions of any new one, by the user's umask: safetensors writes 600."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def locked(folder, why):
    """The folder is this process's alone until the block ends; where another holds it, Refused.

    The lock is on the folder itself, and goes with the process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # pragma: no cover (Windows has none: two runs at once are not noticed)
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(folder)  # renamed or removed by its owner before we had it
        yield
    except (BlockingIOError, FileNotFoundError):
        raise Refused(why) from None
    finally:
        os.close(handle)


def write_text(path, text):
    """Write the file `path` at once, folders included: see `replacing`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def strict(value):
    """`value` for json.dumps, numbers that JSON does not have, NaN and infinity, as null."""
    if isinstance(value, dict):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value, rows=False):
    """Write `value` to the file `path` at once, as JSON that every reader takes; rows: a list, one
    item a line.
    """
    value = strict(value)
    if rows:
        text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    else:
        text = json.dumps(value, indent=1)
    write_text(path, text + "\n")


# ------------------------------------------------------------------------------- provenance
def peak_memory():
    """The most host memory that this process has had, as words."""
    try:
        import resource
    except ImportError:  # Windows
        return "memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return f"at most {peak:.1f} GB of memory"


def provenance():
    """What this process is: how it was called, and on which code. No time, no machine's name and no
    folders of its own, so equal runs say the same: of an absolute path only the name is kept.
    """
    called, root = Path(sys.argv[0]).resolve(), TINY.parent
    inside = called.relative_to(root) if root in called.parents else Path(called.name)
    module = ["-m", ".".join(inside.with_suffix("").parts)]
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(
            ["python", *([str(inside)] if len(inside.parts) == 1 else module), *words]
        ),
        "commit": commit(root),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def commit(root):
    """The commit of the clone `root`, short, "-dirty" where a tracked file differs; else None."""
    ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        if (root / ".git").exists():  # not the one of a folder that a copy lies in
            return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not its owner's clone
        pass
    return None


def write_provenance(path, made):
    """NAME.provenance.json beside the table NAME.json, whose form has no place for it: written
    first, so that a full disk leaves no table without.
    """
    write_json(provenance_path(path), made)


def provenance_path(path):
    return Path(path).with_suffix(".provenance.json")


# ------------------------------------------------------------------- what is ours to write over
RECORD = "strategy.json"  # in every folder that prune.py wrote, and in no other
# what is copied beside the weights: configuration, tokenizer, licence; nothing else of a folder
KEPT_FILES = (
    "config.json generation_config.json tokenizer.model tokenizer.json tokenizer_config.json"
    " special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.json"
    " chat_template.jinja LICENSE LICENSE.txt"
).split()
WEIGHT_FILE = re.compile(r"(model|packed)[\w.-]*\.safetensors(\.index\.json)?")
LONGEST_NAME = 240  # bytes of a folder's name: disks take 255, and a hidden neighbour needs a few
LONGEST_FILE = 160  # of a file's: its neighbours carry the machine's name too, see `replacing`


def can_be_made(path, longest):
    """Whether `path` can be written, its folders with it: the nearest parent that is there is a
    folder that takes new files; no name is too long for a disk, its own not over `longest` bytes.
    """
    nearest = next(filter(os.path.lexists, path.absolute().parents), path)
    lengths = [len(os.fsencode(part)) for part in path.parts]
    short = len(os.fsencode(path.name)) <= longest and max(lengths, default=0) <= 255
    return short and nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def holds(path, ours):
    """Whether the file `path` is JSON of which ours(value) is true; what is no file is not read."""
    try:
        return path.is_file() and bool(ours(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, RecursionError):
        return False


def refuse_to_replace(path, force, precious=()):
    """Refuse to write the folder `path` where that could lose what is not ours.

    force      replaces a folder that prune.py wrote, never a link or anybody else's folder
    precious   the source and texts: `path` may neither be, contain nor lie in one of them
    """
    try:
        here, possible = path.resolve(), can_be_made(path, LONGEST_NAME)
    except (OSError, RuntimeError):  # a name too long, a ring of links
        possible = False
    if not possible:
        raise Refused(f"{str(path)[:80]} cannot be a folder here: choose another --out")
    for kept in (Path.cwd(), *precious):
        if here == kept.resolve() or here in kept.resolve().parents:
            raise Refused(f"{path} holds {kept}, which is needed: choose another --out")
    for kept in precious:
        if kept.resolve() in here.parents:
            raise Refused(f"{path} lies inside {kept}: choose another --out")
    if path.is_symlink():
        raise Refused(f"{path} is a link: choose another --out")
    if path.exists() and not force:
        raise Refused(f"{path} exists already; --force replaces a folder that prune.py wrote")
    if path.exists():
        refuse_foreign(path)


def refuse_foreign(folder):
    """Refuse a folder that prune.py did not write, or in which somebody put anything else since."""
    ours = lambda record: isinstance(record, dict) and "strategy" in record
    if not holds(folder / RECORD, ours):
        raise Refused(
            f"{folder} has no {RECORD} of prune.py, which did not write it and does not replace it"
        )
    for entry in sorted(folder.iterdir()):
        written = entry.name in (RECORD, *KEPT_FILES) or WEIGHT_FILE.fullmatch(entry.name)
        if entry.is_dir() or not written:
            raise Refused(
                f"{folder} holds {entry.name!r:.80}, which prune.py did not write: move that away,"
                " or choose another --out"
            )


def refuse_to_overwrite(path, *forms):
    """Refuse to write the table `path`, and its provenance beside it, over anything but earlier
    ones.

    forms   sets of keys: every row of a table has all the keys of one of them
    """
    if not can_be_made(path, LONGEST_FILE):
        raise Refused(f"{str(path)[:80]} cannot be written here: choose another file")
    if path.is_dir():
        raise Refused(f"{path} is a folder, not a file to write")

    def table(rows):
        fits = lambda row: isinstance(row, dict) and any(form <= row.keys() for form in forms)
        return isinstance(rows, list) and rows and all(map(fits, rows))

    made = lambda value: isinstance(value, dict) and {"command", "commit"} <= value.keys()
    for file, ours, what in ((path, table, ""), (provenance_path(path), made, "'s provenance")):
        if os.path.lexists(file) and not holds(file, ours):
            raise Refused(f"{file} exists and is no earlier table{what}: choose another file")


@contextlib.contextmanager
def new_folder(path, force=False):
    """A folder that appears under its name only when it is complete: yields a hidden neighbour,
    renamed at the end.

    What a killed run left beside `path` goes first; the folder that it was just replacing comes
    back. Of two runs that write one folder at the same time, the second is refused.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old.partial")

    def tidy():
        if old.exists() and not path.exists():  # between the two renames below
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)

    refuse_to_replace(path, force)
    partial.mkdir(parents=True, exist_ok=True)
    busy = f"another process is writing {path}: wait for it, or choose another --out"
    with locked(partial, busy):
        empty(partial)
        tidy()
        try:
            refuse_to_replace(path, force)  # once more: what was moved aside may be back
            yield partial
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            tidy()


def empty(folder):
    """Remove all that a folder holds."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# ----------------------------------------------------------------------------------- journal
class Journal:
    """Values on disk the moment they are known, so that a killed run goes on where it stopped.

    path      JSON file {"inputs": {...}, "values": {key: [value, stamp]}}, written whole at every
              new value; the stamp is the hash of the inputs that the value was made with
    inputs    what all values depend on; resuming from a file with other inputs is refused
    resume    False: an existing file is not read, and replaced at the first value
    """

    def __init__(self, path, inputs, resume):
        self.path, self.inputs, self.values = Path(path), inputs, {}
        sorted_inputs = json.dumps(strict(inputs), sort_keys=True)
        self.stamp = hashlib.sha256(sorted_inputs.encode()).hexdigest()[:12]
        if resume and self.path.exists():
            self.values = self.read(self.path)

    def read(self, path):
        """The values of a journal of the same inputs, the own or another process's."""
        content = read_json(path)
        earlier, values = content.get("inputs"), content.get("values")
        if not (isinstance(earlier, dict) and isinstance(values, dict)):
            raise Refused(f"{path} holds no journal to resume from")
        now = strict(self.inputs)
        for key in now | earlier:  # a key that only one of them has is a difference too
            if earlier.get(key) != now.get(key):
                raise Refused(
                    f"{path} holds a run with another {key}: {earlier.get(key)!r},"
                    f" now {now.get(key)!r}"
                )
        try:
            pairs = {key: (value, stamp) for key, (value, stamp) in values.items()}
        except (TypeError, ValueError):
            pairs = {"": (None, None)}
        if any(stamp != self.stamp for _, stamp in pairs.values()):
            raise Refused(f"{path} holds values of another run, or of an earlier version")
        return {key: value for key, (value, _) in pairs.items()}

    def __contains__(self, key):
        return key in self.values

    def __call__(self, key, make):
        """The value of `key`, JSON, from the file or by calling `make` once."""
        if key not in self.values:
            self.remember(key, make())
        return self.values[key]

    def remember(self, key, value):
        self.values[key] = value
        self.write()

    def write(self):
        values = {key: [value, self.stamp] for key, value in self.values.items()}
        write_json(self.path, {"inputs": self.inputs, "values": values})
