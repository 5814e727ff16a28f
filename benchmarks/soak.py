"""Attack the library for a while, and count what must not happen: losses, tracebacks, escapes, hangs, silent changes.

    python benchmarks/soak.py --minutes 45 --seed 1

Every area draws from a generator of its own, so a seed gives the same cases whatever the time; a slower machine does
fewer of them. Results: benchmarks/soak.md. It runs on Linux, and needs the package's extras torch and record.
"""

import argparse
import asyncio
import gc
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import undertow as ut
from undertow import images
from undertow.cli import main
from undertow.derive import directional
from undertow.errors import UndertowError
from undertow.frameworks.torch.weights import fit, read_state

MEASURES = ["channel-norm", "zero-fraction", "histogram", "moments", "keep"]
SECONDS = 20
_MEMORY = 16 << 30  # of addresses; a case that takes more fails, and not the machine


class Hung(BaseException):
    """A case has taken too long."""


@dataclass
class Tally:
    """What came of the cases of one area."""

    area: str
    cases: int = 0
    refused: int = 0
    lost: int = 0
    tracebacks: int = 0
    escapes: int = 0
    hangs: int = 0
    silent: int = 0
    seconds: float = 0.0
    examples: list[str] = field(default_factory=list)

    @contextmanager
    def case(self, what: str, seconds: int = SECONDS) -> Iterator[None]:
        """Count one case: done, refused in one line, or what must not be."""
        self.cases += 1
        before = signal.signal(signal.SIGALRM, _hung)
        signal.alarm(seconds)
        try:
            yield
        except UndertowError as error:
            self.refused += 1
            if not str(error).isprintable():
                self.note("tracebacks", f"{what}: an error of several lines")
        except Hung:
            self.note("hangs", what)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.note("tracebacks", f"{what}: {type(error).__name__}: {error} at {place.filename}:{place.lineno}")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def note(self, kind: str, what: str) -> None:
        """Count what must not be, and keep the first few."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < 3:
            self.examples.append(f"{kind}: {what[:300]}")


def _hung(number: int, frame: Any) -> None:
    raise Hung


_ONE_AT_A_TIME = threading.Lock()
Area = Callable[[Tally, random.Random, Path, Callable[[], bool]], None]


def network() -> nn.Sequential:
    """A network that is quick, in evaluation mode, and the same every time."""
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):  # torch's generator is the process's
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()


def batch_of(number: int) -> torch.Tensor:
    """Two samples."""
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(number))


def train(folder: Path, batches: int = 24, pause: float = 0.0, group: int = 3) -> None:
    """Record a loop over batches that are the same whenever they come."""
    model = network()
    with ut.record(folder, model, sites="**", measures=MEASURES, group=group, loss_reduction="sum") as recording:
        for number in range(batches):
            with recording.batch(samples=[f"{number}a", f"{number}b"], batch=number):
                model(batch_of(number)).square().sum().backward()
            time.sleep(pause)


def answers(folder: Path) -> str:
    """All that can be read of a run."""
    run = ut.Run(folder)
    rows = {name: sorted(map(repr, run.table(name).to_pylist())) for name in run.tables}
    tensors = [(row["file"], hashlib.sha256(values).hexdigest()) for row, values in run.tensors()]
    facts = {key: value for key, value in run.manifest.items() if key not in ("created", "sha256")}
    return repr((facts, rows, sorted(tensors), run.quantiles([0.1, 0.5, 0.9]), run.sites))


def forked(work: Callable[[], object]) -> int:
    """Run in a forked child, quietly; return its process id. It exits with 0, or 2 for an error of the library's."""
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            work()
            code = 0
        except UndertowError:
            code = 2
        except KeyboardInterrupt:  # it came before the command had begun
            code = 130
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        finally:
            os._exit(code)
    return child


def ended(child: int, seconds: float = SECONDS) -> int | None:
    """Wait for a child; return its exit code, negative for a signal, None for a hang."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def killed_loops(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Training loops, killed (or terminated) at random moments and gone on with until they end."""
    train(folder / "whole", pause=0)
    whole, run = answers(folder / "whole"), folder / "run"
    while going():
        child = forked(lambda: train(run, pause=0.003))
        time.sleep(rng.uniform(0.0, 0.15))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        with suppress(ProcessLookupError):
            os.kill(child, number)
        code = ended(child)
        with tally.case(f"{number.name} of a loop"):
            if code is None:
                tally.note("hangs", "a killed loop")
            elif code not in (0, -signal.SIGKILL, 143, -signal.SIGTERM):
                tally.note("tracebacks", f"a loop ended with {code}")
            if (run / "manifest.json").exists():
                held = ut.Run(run)
                if not held.check().whole:
                    tally.note("lost", str(held.check().faults[0]))
                if held.finished:
                    if answers(run) != whole:
                        tally.note("silent", "a resumed run differs from an undisturbed one")
                    shutil.rmtree(run)


def killed_commands(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """`undertow record` and `undertow explain` on a folder of photographs, killed at random moments."""
    (folder / "photographs").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{i}.png")
    (folder / "nets.py").write_text(
        "import torch\n"
        "def load():\n"
        "    torch.manual_seed(0)\n"
        "    m = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),\n"
        "                            torch.nn.Flatten(), torch.nn.Linear(4, 3))\n"
        "    return {'module': m, 'preprocessing': {'resize': 32, 'crop': 32}}\n"
    )
    model = ["--model", f"{folder / 'nets.py'}:load"]
    record = ["record", str(folder / "photographs"), *model, "--batch-size", "1", "--measure", "keep"]
    explain = ["explain", str(folder / "photographs"), *model, "--rule", "guided", "--out", str(folder / "out")]
    warm = forked(lambda: main([*record, "--out", str(folder / "whole")]))
    if ended(warm, 120) != 0:
        tally.note("tracebacks", "undertow record does not work at all")
        return
    run, whole = folder / "run", {tuple(sorted(row.items())) for row in _kept(folder / "whole")}
    while going():
        what = rng.choice(["record", "explain"])
        words = [*record, "--out", str(run), "--resume"] if what == "record" else explain
        child = forked(lambda words=words: main(words))
        time.sleep(rng.uniform(0.0, 0.8))
        with suppress(ProcessLookupError):
            os.kill(child, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        code = ended(child)
        with tally.case(f"a kill of {what}"):
            if code is None:
                tally.note("hangs", what)
            elif code == 1:
                tally.note("tracebacks", f"{what} ended with 1")
            if what == "explain":
                _refuse_half_results(tally, folder / "out")
            elif (run / "manifest.json").exists():
                if not ut.Run(run).check().whole:
                    tally.note("lost", str(ut.Run(run).check().faults[0]))
                if ut.Run(run).finished:
                    if {tuple(sorted(row.items())) for row in _kept(run)} != whole:
                        tally.note("silent", "a resumed record differs")
                    shutil.rmtree(run)
    if ended(forked(lambda: main(explain)), 120) == 0:
        for aside in (folder / "out").rglob(".*"):
            tally.note("lost", f"an aside is left: {aside.name}")


def _kept(run: Path) -> list[dict[str, Any]]:
    return [
        {"batch": row["batch"], "site": row["site"], "sha": hashlib.sha256(values).hexdigest()}
        for row, values in ut.Run(run).tensors()
    ]


def _refuse_half_results(tally: Tally, out: Path) -> None:
    """A folder with a result.json is complete."""
    for path in out.glob("*/result.json"):
        result = json.loads(path.read_text())
        for name in result["files"]:
            if not (path.parent / name).stat().st_size:
                tally.note("lost", f"{name} is empty")


def hostile_disks(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Full disks (by a limit on files), folders without rights, folders deleted while they are written."""
    train(folder / "whole")
    whole = answers(folder / "whole")
    while going():
        run, kind = folder / "run", rng.choice(["full", "read-only", "deleted"])
        run.mkdir()
        limit, table = rng.choice([0, 200, 2000, 4000, 6000]), rng.choice([*os.listdir(folder / "whole"), "."])

        def work(kind: str = kind, limit: int = limit, table: str = table, run: Path = run) -> None:
            if kind == "full":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            elif kind == "read-only":
                os.chmod(run, 0o555)
                os.setuid(65534)
            else:
                timer = threading.Timer(limit / 40_000, lambda: shutil.rmtree(run / table, ignore_errors=True))
                timer.start()
            train(run, pause=0.005)

        code = ended(forked(work))
        with tally.case(f"{kind} {table if kind == 'deleted' else limit}"):
            if code is None:
                tally.note("hangs", kind)
            elif code not in (0, 2):
                tally.note("tracebacks", f"{kind} ended with {code}")
            elif code == 0 and answers(run) != whole:
                tally.note("silent", f"{kind} {table} ended as finished, with other rows")
        tally.refused += code == 2
        shutil.rmtree(run, ignore_errors=True)


def tampered_runs(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Bytes flipped, files cut, swapped, linked and removed, manifests of nonsense; some with checksums that fit."""
    train(folder / "whole", batches=5)
    right, secret = answers(folder / "whole"), folder / "secret"
    secret.write_text("not to be touched")
    names = [p.relative_to(folder / "whole") for p in (folder / "whole").rglob("*") if p.is_file()]
    names = sorted(name for name in names if not name.name.startswith("."))
    while going():
        run = shutil.copytree(folder / "whole", folder / "run")
        sealed = rng.random() < 0.5
        what = _tamper(run, rng.choice(names), names, rng, secret)
        if sealed:
            _seal(run)
        with tally.case(f"{what}{' sealed' * sealed}"):
            said = answers(run)
            ut.Run(run).check()
            ut.diagnose(run)
            if said != right and not sealed:
                tally.note("silent", what)
        if secret.read_text() != "not to be touched":
            tally.note("escapes", what)
        shutil.rmtree(run)


def _tamper(run: Path, name: Path, names: list[Path], rng: random.Random, secret: Path) -> str:
    """Change one thing; return what."""
    path = run / name
    kind = rng.choice(["flip", "flip", "flip", "cut", "swap", "link", "remove", "grow", "manifest", "manifest"])
    content = bytearray(path.read_bytes())
    if kind == "flip" and content:
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "swap":
        path.write_bytes((run / rng.choice(names)).read_bytes())
    elif kind == "link":
        path.unlink()
        path.symlink_to(rng.choice([secret, Path("/dev/zero"), run / rng.choice(names)]))
    elif kind == "remove":
        path.unlink()
    elif kind == "grow":
        path.write_bytes(content + rng.randbytes(rng.randrange(1, 99)))
    elif kind == "manifest":
        with suppress(ValueError):
            manifest = json.loads((run / "manifest.json").read_text())
            _mangle(manifest, rng)
            (run / "manifest.json").write_text(json.dumps(manifest))
    return f"{kind} {name}"


NONSENSE = [None, True, -1, 2**70, 1e308, "", "../x", "/etc/passwd", "\x1b[31m", [], [[]], {}, {"": None}, "a" * 10_000]


def _mangle(value: Any, rng: random.Random) -> None:
    """Replace, drop or add something in plain data, at a random depth."""
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        if rng.random() < 0.2 and isinstance(value, dict):
            value[str(rng.choice(NONSENSE))[:50]] = value.pop(key)
        else:
            value[key] = rng.choice(NONSENSE)
        return


def _seal(run: Path) -> None:
    """Write every checksum anew, as an attacker can."""
    for path in (path for path in (run / "checksums").glob("*.sha256") if not path.is_symlink()):
        with suppress(OSError, ValueError, LookupError):
            names = [line.split("  ")[1] for line in path.read_text().splitlines()]
            files = [name for name in names if (run / name).is_file() and not (run / name).is_symlink()]
            digests = (hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files)
            path.write_text("".join(f"{d}  {n}\n" for d, n in zip(digests, files, strict=True)))
    if (run / "manifest.json").is_symlink():
        return
    with suppress(OSError, ValueError, AttributeError):
        manifest = json.loads((run / "manifest.json").read_text())
        manifest.pop("sha256", None)
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (run / "manifest.json").write_text(json.dumps(manifest))


def _mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.2 else changed)


def mutated_images(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Photographs of every format with bytes changed: an image, or one line; nothing on stderr."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50, 3), np.uint8))
    seeds = []
    tiffs = [("TIFF", {"compression": c}) for c in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    for kind, options in [*((k, {}) for k in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM")), *tiffs]:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        seeds.append(file.getvalue())
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            while going():
                (folder / "x").write_bytes(_mutated(rng.choice(seeds), rng))
                with tally.case("an image"):
                    images.read(folder / "x")
        finally:
            os.dup2(stderr, 2)
        if os.fstat(log.fileno()).st_size:
            log.seek(0)
            tally.note("escapes", f"lines of a decoder reached stderr: {log.read(200)!r}")


def mutated_weights(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Weights files with bytes changed: the same tensors, others, or one line; the network is whole after a refusal."""
    state = network().state_dict()
    torch.save(state, folder / "w.pt")
    safetensors.torch.save_file(state, folder / "w.safetensors")
    seeds = [(suffix, (folder / f"w{suffix}").read_bytes()) for suffix in (".pt", ".safetensors")]
    while going():
        suffix, data = rng.choice(seeds)
        path = folder / f"x{suffix}"
        path.write_bytes(_mutated(data, rng))
        with tally.case(f"weights {suffix}"), warnings.catch_warnings(action="ignore"):
            fit(network(), read_state(path), path, "net")


ENDS = ["raise SystemExit(0)", "raise KeyboardInterrupt", "raise GeneratorExit", "1 / 0", "return", "return 3", "x = ",
        "raise type('E', (Exception,), {'__str__': lambda s: 1 / 0})", "return {'module': 3}", "import nothing_at_all",
        "return torch.nn.Identity()", "return {'module': torch.nn.Linear(2, 2), 'classes': ['\\x1b[31m']}",
        "raise type('\\x1b[31m', (BaseException,), {})('a\\nb')", "import sys; sys.path.clear(); return", "0" * 9,
]  # fmt: skip


def model_files(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Files of networks that raise, return nonsense, or are none: exit code 2 and one line that names the file."""
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    path = sys.path.copy()
    while going():
        file = folder / f"nets{tally.cases}.py"
        file.write_text(f"import torch\ndef load():\n    {rng.choice(ENDS)}\n")
        said = io.StringIO()
        with tally.case(file.read_text()), redirect_stderr(said), redirect_stdout(io.StringIO()):
            try:
                main(["explain", str(folder / "a.png"), "--model", f"{file}:load", "--out", str(folder / "out")])
            except SystemExit as left:
                if left.code != 2 or said.getvalue().count("\n") != 1 or file.name not in said.getvalue():
                    tally.note("tracebacks", f"{left.code} {said.getvalue()}")
        sys.path[:] = path
        file.unlink()


WORDS = ["X", "A", "2", "3/7", "0.5", "tr(X)", "det(A)", "inv(A)", "X.T", "normF(X)", "exp(X)", "relu(A)", "sqrt(X)"]
SIGNS = [" + ", " - ", "*", ".*", "./", "/", "**2*", "**-1*", "**99999*", "⁻¹*", "ᵀ*", "(", ")", ",", "[", "9" * 400]


def expressions(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Matrix expressions, whole and mutilated: a derivative that agrees with autograd, or one line."""
    shapes = {"X": ("d", "d"), "A": ("d", "d")}
    while going():
        text = rng.choice(WORDS)
        for _ in range(rng.choice([1, 3, 8, 30])):
            text = text + rng.choice(SIGNS[:5] if rng.random() < 0.8 else SIGNS) + rng.choice(WORDS)
            text = f"{rng.choice(['', 'tanh', 'inv', 'tr'])}({text})" if rng.random() < 0.2 else text
        with tally.case(text), np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
            d = directional(text, "X", shapes)
            tally.refused += not (d.text and d.latex and d.remarks is not None)
            if not d.check() < 1e-6:
                tally.note("silent", f"{text}: {d.check()}")


def _raises(g: Any, local: Any) -> Any:
    raise ValueError("mine")


def _mutates(g: Any, local: Any) -> Any:
    return local(g.mul_(0))


RULES: list[Any] = [
    "gradient", "guided", "deconvnet", _raises, _mutates, lambda g, local: None, lambda g, local: g[:1],
    lambda g, local: local(g) * float("nan"), lambda g, local: local(g).double(), lambda g, local: local(g[..., :1]),
    lambda g, local: local(local(g)), lambda g, local: local(g).view(-1)[: g.numel()].view(g.shape), lambda g: g, 3,
    lambda g, local: local(g).expand(g.shape), lambda g, local: local("x"), "nothing",
]  # fmt: skip
SITES = ["conv", "**", "conv[:1]", "linear", "[", "conv[9]", "", "\x1b", "*" * 99, "0,2,0", "conv[::0]", "conv[-1:]"]


def calls(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Rules that misbehave, odd targets, selections and quantiles, with the collector of garbage off."""
    model, x = network(), batch_of(0)
    plain = ut.explain(model, x, rule="gradient").numpy()
    train(folder / "run", batches=2)
    run = ut.Run(folder / "run")
    gc.collect()
    gc.disable()
    objects = None
    while going():
        rule, target = rng.choice(RULES), rng.choice([None, 0, "top:2", [0, 1], 99, -1, "x", [[0, 1]], 1.5])
        with tally.case(f"explain {rule} {target}"), warnings.catch_warnings(action="ignore"):
            if callable(rule) and rule is not RULES[0]:
                with suppress(Exception):  # what a rule raises is its own affair
                    ut.explain(model, x, rule=rule, target=target)
            else:
                ut.explain(model, x, rule=rule, target=target)
        with tally.case("explain, after it"):
            if not np.array_equal(ut.explain(model, x, rule="gradient").numpy(), plain):
                tally.note("silent", f"after {rule} the plain gradient is another")
        word = rng.choice(SITES)
        with tally.case(f"select {word!r}"):
            ut.select(model, word, example=x)
        q = [rng.choice([0, 1, 0.5, -1, 2, float("nan"), 1e-300]) for _ in range(rng.randrange(3))]
        with tally.case(f"quantiles {q}"):
            run.quantiles(q, of=rng.choice(["magnitude", "value", "channel_norm", "x"]), by=rng.choice(["site", "x"]))
        if tally.cases % 2000 == 0:
            count = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
            objects = objects or count
            if count > objects + 200:
                tally.note("lost", f"{count - objects} tensors are kept alive")
    gc.enable()
    gc.collect()


def batches(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Batches recorded with the collector of garbage off: memory stays, rows are all there."""
    model, names = network(), ["a", "b"]
    gc.collect()
    gc.disable()
    start = None
    with ut.record(folder / "run", model, sites="**", measures=MEASURES[:3], group=64) as recording:
        while going():
            with tally.case("a batch"), recording.batch(samples=names):
                model(batch_of(tally.cases % 7)).sum().backward()
                model.zero_grad()
            if tally.cases % 2000 == 0:
                recording.flush()
                held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                start = start or held
                if held > start + 100_000:
                    tally.note("lost", f"{(held - start) // 1000} MB more than at the start")
    gc.enable()
    if ut.Run(folder / "run").table("batches").num_rows != tally.cases:
        tally.note("lost", "batches are missing")


def _spawned(folder: str) -> None:
    train(Path(folder), batches=4)


def processes(tally: Tally, rng: random.Random, folder: Path, going: Callable[[], bool]) -> None:
    """Forks inside a recording, threads, spawned processes, tasks of asyncio."""
    train(folder / "whole", batches=4)
    whole, model = answers(folder / "whole"), network()
    while going():
        kind, run = (
            rng.choice(["fork", "fork", "threads", "asyncio"] + ["spawn"] * (tally.cases % 50 == 0)),
            folder / "r",
        )
        with tally.case(kind, 120):
            if kind == "fork":
                with ut.record(run, model, sites="conv", group=1) as recording:
                    with recording.batch():
                        model(batch_of(0)).sum().backward()
                    uses = [recording.flush, lambda r=recording: r.__exit__(None, None, None), lambda r=run: train(r)]
                    code = ended(forked(rng.choice(uses)))
                    if code is None:
                        tally.note("hangs", kind)
                    elif code != 2 or ut.Run(run).finished:
                        tally.note("silent", f"a child's use ended with {code}")
            elif kind == "threads":
                threads = [threading.Thread(target=train, args=(run / str(i), 4)) for i in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if any(answers(run / str(i)) != whole for i in range(4)):
                    tally.note("silent", "a run of a thread differs")
            elif kind == "asyncio":
                asyncio.run(_tasks(run))
                if any(answers(run / str(i)) != whole for i in range(3)):
                    tally.note("silent", "a run of a task differs")
            else:
                process = multiprocessing.get_context("spawn").Process(target=_spawned, args=(str(run),))
                process.start()
                process.join(100)
                if process.exitcode != 0 or answers(run) != whole:
                    tally.note("lost", f"a spawned process ended with {process.exitcode}")
        shutil.rmtree(run, ignore_errors=True)


async def _tasks(folder: Path) -> None:
    await asyncio.gather(*(asyncio.to_thread(train, folder / str(i), 4) for i in range(3)))


AREAS: dict[str, tuple[Area, int, float]] = {
    "mutated images": (mutated_images, 10_000, 2),
    "mutated weights": (mutated_weights, 2000, 1),
    "model files": (model_files, 300, 1),
    "expressions": (expressions, 2000, 4),
    "batches": (batches, 20_000, 5),
    "forks, threads, spawn, asyncio": (processes, 300, 4),
    "tampered runs": (tampered_runs, 3000, 9),
    "rules, selections, quantiles": (calls, 80_000, 12),
    "full, read-only, deleted": (hostile_disks, 400, 8),
    "record and explain killed": (killed_commands, 300, 10),
    "training loops killed": (killed_loops, 700, 10),
}
"""For each area the function, how many cases at most, and its share of the time left for it and those behind it.

Those that end before their time come first, so that the others have it.
"""


def run_area(name: str, seed: int, seconds: float) -> Tally:
    """Run one area until its cases or its time are used up."""
    area, most, _ = AREAS[name]
    tally, started = Tally(name), time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        os.chmod(folder, 0o755)
        try:
            area(
                tally,
                random.Random(f"{seed} {name}"),
                Path(folder),
                lambda: tally.cases < most and time.monotonic() - started < seconds,
            )
        except Exception:
            tally.note("tracebacks", traceback.format_exc()[-300:])
        for path in Path(folder).rglob("*"):
            with suppress(OSError):
                path.chmod(0o755, follow_symlinks=False) if path.is_dir() else None
    tally.seconds = time.monotonic() - started
    return tally


COLUMNS = ("cases", "refused", "lost", "tracebacks", "escapes", "hangs", "silent")


def soak() -> int:
    """Run all areas and print the table; return how many things happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="*", choices=AREAS, default=list(AREAS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(f"seed {options.seed}, at most {options.minutes:g} minutes, torch {torch.__version__}\n")
    print(f"| area | seconds | {' | '.join(COLUMNS)} |\n|---|{'--:|' * (len(COLUMNS) + 1)}")
    wrong, examples, end = 0, [], time.monotonic() + 60 * options.minutes
    for i, name in enumerate(options.only):
        share = AREAS[name][2] / sum(AREAS[other][2] for other in options.only[i:])
        tally = run_area(name, options.seed, share * (end - time.monotonic()))
        counts = [getattr(tally, column) for column in COLUMNS]
        print(f"| {name} | {tally.seconds:.0f} | {' | '.join(f'{count:,}' for count in counts)} |", flush=True)
        wrong += sum(counts[2:])
        examples += [f"{name}: {example}" for example in tally.examples]
    print("", *examples, sep="\n")
    return wrong


if __name__ == "__main__":
    sys.exit(min(soak(), 1))
