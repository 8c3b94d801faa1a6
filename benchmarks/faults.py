"""Every command that writes, under faults: killed, with a full disk, and where nobody may write.

    python benchmarks/faults.py [--points 12] [--seed 0] [--folder FOLDER] [COMMAND ...]

Each command runs on a small data set under ptrace (tests/cache/syscalls.py), and a fault is put before system calls
that change a file, drawn by the seed. Then the same command runs again undisturbed. A point is survived if that ends
with 0 and leaves the files that an undisturbed command leaves, with the same content, and nothing else: no temporary
file, no lock, no process. Under a refused write the command ends with one line of mmfeat or does without the file.
Exit code 1 where a point was not survived; needs Linux. A folder in memory, such as /dev/shm, is several times faster.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CLIP = "clip:model"
QUICK = "--fusion concat --baselines ridge --modalities both --folds 2 --seeds 1 --epochs 2"
HEADS = f"heads --data demo --encoders hashing,{CLIP} {QUICK}"
MAKE = f"extract --data demo --encoders hashing,{CLIP} --dtype float32"
# name -> the commands that come before, and the command under faults; all in one folder.
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "extract": ((), MAKE),
    "extract, a runtime": ((), f"{MAKE} --runtime onnxruntime"),
    "audit": ((MAKE, HEADS), "audit --data demo --export doubts.csv"),
    "heads": ((MAKE,), HEADS),
    "heads, a search": ((MAKE,), f"{HEADS} --search optuna --trials 3 --learning-rate 1e-4..1e-2"),
    "finetune": ((MAKE, HEADS), "finetune --unfreeze text:1 --epochs 1 --seeds 1 --checkpoint-seconds 0"),
    "report": ((MAKE, HEADS), "report --csv --out page.html"),
    "submit": ((MAKE, HEADS), "submit --data demo --out submission.csv"),
    "predict": ((MAKE, HEADS), "predict demo/data --out predictions.jsonl"),
    "export": ((MAKE, HEADS), "export --head concat --out exported"),
    "neighbours": ((MAKE,), "neighbours --text day --encoder hashing --out near.html"),
    "cache pack": ((MAKE,), "cache pack --encoders hashing --out all.h5"),
    "cache pack, npy": ((MAKE,), "cache pack --out all.npy"),
    "cache gc": ((MAKE, "extract --data demo --encoders hog"), "cache gc --runs none --yes"),
    "runs rm": ((MAKE, HEADS), "runs rm RUN --yes"),
}
# Parts of JSON files, and files, that depend on the moment: when, how long, whether photos were too new to be indexed.
TIMES = ("seconds", "record", "sha256", "kept")
TIMELY = re.compile(r"images\.index|.*\.seconds")
FAULTS = {"killed": 0, "disk full": errno.ENOSPC, "disk full once": errno.ENOSPC, "no right": errno.EROFS}
SECONDS = 120.0  # that a command may take


class Place:
    """A folder in which commands run: `work` is filled anew for each point, `home` and `tmp` belong to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.log = folder.with_name(f"{folder.name}.log")

    def prepare(self, commands: tuple[str, ...]) -> Path:
        """The folder that the commands before leave, made once."""
        base = self.folder.with_name(f"base-{hashlib.sha256(repr(commands).encode()).hexdigest()[:8]}")
        if not base.exists():
            self.fill(self.folder.with_name("start"))
            for command in commands:
                if self.run(command):
                    raise SystemExit(f"{command}: {self.said()}")
            for path in self.work.rglob("*"):
                os.utime(path, (time.time() - 7200,) * 2, follow_symlinks=False)  # cache gc spares what is new
            shutil.copytree(self.work, base, symlinks=True)
        return base

    def fill(self, base: Path) -> None:
        """Let `work` be as `base` is, and nothing be elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(base, self.work, symlinks=True)
        for name in ("home", "tmp"):
            (self.folder / name).mkdir()

    def child(self, command: str) -> None:
        """Run a command in this process, which is a child and ends with it."""
        from mmfeat.cli.main import main

        os.environ |= {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp"), "COLUMNS": "80"}
        tempfile.tempdir = None
        os.chdir(self.work)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["mmfeat", *command.replace("RUN", self.name_of_run()).split()]
        code: object = 70
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback

            traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(code if isinstance(code, int) else 0 if code is None else 70)

    def name_of_run(self) -> str:
        return next((str(path.parent) for path in Path("heads").glob("*/run.json")), "heads/gone")

    def run(self, command: str) -> int:
        """The exit code of an undisturbed command; 124 where it hangs."""
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            self.child(command)
        end = time.monotonic() + SECONDS
        while (result := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(pid, 9)
                os.waitpid(pid, 0)
                return 124
            time.sleep(0.01)
        left_over_processes(pid)
        return os.waitstatus_to_exitcode(result[1])

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def contents(self) -> dict[str, object]:
        """Path -> content of all files, without times; shards of one folder as rows, which a kill may distribute
        otherwise."""
        found: dict[str, object] = {}
        for path in sorted([*self.work.rglob("*"), *(self.folder / "tmp").rglob("*")]):  # not the caches of libraries
            name = str(path.relative_to(self.folder))
            if TIMELY.fullmatch(path.name):
                continue
            if path.is_dir():  # an empty folder is harmless unless its name is temporary
                if any(path.iterdir()) or path.name.startswith("."):
                    found[f"{name}/"] = ""
            elif path.suffix == ".h5" and "cache" in path.parts:
                found.setdefault(str(Path(name).with_name("*.h5")), {}).update(rows_of(path))  # type: ignore[attr-defined]
            elif path.suffix == ".json":
                found[name] = timeless(json.loads(path.read_text()))
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


def rows_of(path: Path) -> dict[bytes, bytes]:
    """Key -> vector of the pooled rows of a shard."""
    import h5py

    with h5py.File(path) as shard:
        (values,) = [shard[name] for name in shard if name in ("pooled", "tokens", "prefix")]
        parts = list(values) if "bounds" not in shard else [
            values[one:other] for one, other in zip(shard["bounds"][:-1], shard["bounds"][1:], strict=True)
        ]  # fmt: skip
        return {bytes(key): part.tobytes() for key, part in zip(shard["keys"], parts, strict=True)}


def timeless(value: object) -> object:
    """A JSON value without `TIMES`."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def left_over_processes(group: int) -> int:
    """How many processes of a group live on for seconds after its first one; they are ended."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return 0
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 9)
    return 1


def difference(found: dict[str, object], wanted: dict[str, object], loose: set[str]) -> str:
    """What is wrong with the files of a folder; empty where nothing is. Of `loose` files the name counts."""
    more, less = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name] and name not in loose)
    parts = {"left over": more, "missing": less, "other content": other}
    return "; ".join(f"{what} {', '.join(names[:4])}" for what, names in parts.items() if names)


def complaint(place: Place, fault: str, status: int) -> str:
    """What is wrong with the end of a command whose writing was refused."""
    said = place.said()
    last = said.strip().rpartition("\n")[2]
    if "Traceback" in said or "--debug" in said or status not in (0, 1):
        return f"{fault}: ended {status} with {said[-600:]!r}"
    lines = [line for line in said.splitlines() if line.startswith("mmfeat: ")]
    if status == 1 and len(lines) != 1:
        return f"{fault}: no single line: {last!r}"
    return ""


def points(place: Place, name: str, count: int, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(Fault, where it was put, what went wrong or "") for points drawn among the calls that change a file."""
    from tests.cache.syscalls import Fault, trace

    before, command = COMMANDS[name]
    base = place.prepare(before)

    def traced(fault: Fault | None = None):
        place.fill(base)
        return trace(lambda _: place.child(command), place.folder, fault, SECONDS)

    calls = traced().calls
    wanted = place.contents()
    place.fill(base)
    if code := place.run(command):
        raise SystemExit(f"{name} ended with {code}: {place.said()}")
    again = place.contents()
    loose = {path for path in wanted if path in again and wanted[path] != again[path]}
    if names := difference(again, wanted, loose):
        raise SystemExit(f"{name}: two undisturbed commands differ: {names}")
    if loose:
        print(f"  {name}: of these only the names are compared: {', '.join(sorted(loose))}", file=sys.stderr)
    changing = [at for at, call in enumerate(calls) if call.changes]
    needing = [at for at, call in enumerate(calls) if call.takes_space]
    print(f"  {name}: {len(changing)} of {len(calls)} calls change a file", file=sys.stderr, flush=True)
    for kind, number in FAULTS.items():
        many = {"killed": count, "no right": 1}.get(kind, max(1, count // 3))
        among = changing if kind == "killed" else needing
        for at in [needing[0]] if kind == "no right" else sorted(rng.sample(among, min(many, len(among)))):
            later = (lambda call: call.takes_space) if number and kind != "disk full once" else None
            fault = Fault(at, "fail" if number else "kill before", number, later)
            outcome = traced(fault)
            where = f"call {at}, {calls[at]}"
            wrong = "" if outcome.hit or outcome.status == 0 else f"ended {outcome.status}: {place.said()[-300:]}"
            if left_over_processes(outcome.pid):
                wrong = "a process lives on"
            if number:
                wrong = wrong or complaint(place, kind, outcome.status)
            code = place.run(command)
            done = (outcome.status == 0 and number) or "no such run" in place.said()
            if code and not (done and ("no such run" in place.said() or "this exists" in place.said())):
                wrong = wrong or f"then ended {code}: {place.said()[-500:]}"
            found, needed = place.contents(), wanted
            if number and outcome.status == 0:  # it did without a file, as of a cache, and there is nothing more to do
                needed = {path: content for path, content in wanted.items() if path in found}
            yield kind, where, wrong or difference(found, needed, loose)


def start(folder: Path) -> None:
    """A folder with the data set and the encoder that all commands begin with."""
    from mmfeat.samples.demo import write_demo
    from tests.encoders.tiny_models import write_clip

    write_demo(folder / "demo", pairs=40)
    write_clip(folder / "model")


def main() -> None:
    """Print a table: command, faults, what was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--points", type=int, default=12, help="kills of each command; a third of it of other faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    given = parser.parse_args()
    import torch.onnx  # noqa: F401  so that the children do not

    import tests.imports  # noqa: F401

    with contextlib.ExitStack() as stack:
        root = Path(given.folder or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        place = Place(root / "place")
        if not (root / "start").exists():
            pid = os.fork()  # what uses threads must not be done in the process that forks
            if not pid:
                start(root / "start")
                os._exit(0)
            os.waitpid(pid, 0)
        print("| command | " + " | ".join(FAULTS) + " |\n| --- |" + " --- |" * len(FAULTS), flush=True)
        failed = 0
        for name in given.commands or COMMANDS:
            tried, survived = Counter[str](), Counter[str]()
            for kind, where, wrong in points(place, name, given.points, random.Random(given.seed)):
                tried[kind] += 1
                survived[kind] += not wrong
                if wrong:
                    print(f"  {name}, {kind}, {where}: {wrong}", file=sys.stderr, flush=True)
            cells = " | ".join(f"{survived[kind]} / {tried[kind]}" for kind in FAULTS)
            print(f"| {name} | {cells} |", flush=True)
            failed += sum(tried.values()) - sum(survived.values())
    raise SystemExit(int(failed > 0))


if __name__ == "__main__":
    main()
