"""Runtimes: the forward pass of a tower by whatever computes it fastest on this processor, with torch's numbers.

The first batch of the user's own samples decides: what differs from torch's plain pass by more than `TOLERANCE` is
refused, the rest is timed. A tower is exported once, as ONNX, into the folder `.runtimes` of the cache; the decision
lies beside it, for each machine and its libraries. Both may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmfeat.encoders.faster import Changes, faster
from mmfeat.encoders.layers import Network
from mmfeat.encoders.onnx_file import LARGEST, open_onnx, write_onnx
from mmfeat.encoders.torch_tower import LIBRARIES, Runtime, TorchTower, check_compiler, cut, export_name
from mmfeat.encoders.weights import one_line
from mmfeat.errors import WriteError
from mmfeat.system.files import canonical_json, read_json, temporary_file, write_json
from mmfeat.version import versions

TOLERANCE = 1e-5  # largest difference to torch's plain pass, as a share of the row's largest value
LEAST_COSINE = 0.999  # of rows in half precision, as `cache verify --parity` asks it of them
WORTH_A_TRIAL = 5.0  # seconds of torch's plain pass that are left, from which another may be faster in all
WORTH_AN_EXPORT = 30.0  # the same of the fastest pass by torch: an export takes 5 to 20 seconds
ROUNDS = 3
FASTER = 1.1  # times as fast as torch, from which a runtime of another library is kept
WEIGHTS = {"plain": 1.0, "torch": 1.05}
TITLES = {
    "torch": "torch with folded and packed weights",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
GRAPH = "model.onnx"
Pass = Callable[[Any], Tensor]


class Refused(Exception):
    """Why a runtime cannot stand for torch, in words."""


class FastestPass:
    """The forward pass of a tower, inputs -> (B, D), by the runtime that is chosen at the first batch.

    `note` says which one it is, once that is known, "" for torch's plain pass.
    """

    def __init__(self, tower: TorchTower, runtime: Runtime) -> None:
        self.tower, self.runtime, self.note = tower, runtime, ""
        self.plain = self.forward = tower.network.forward
        self.name = ""  # of the runtime that was chosen
        if runtime.name == "compile":
            check_compiler("cpu")

    def __call__(self, inputs: Any) -> Tensor:
        if not self.name:
            return self._first(inputs)
        try:
            return self.forward(inputs)
        except Exception as error:  # each runtime has errors of its own
            if self.forward is self.plain:
                raise
            self.forward = self.plain
            self.note += f"; torch from then on, as it failed ({one_line(error)})"
            return self.plain(inputs)

    def _first(self, inputs: Any) -> Tensor:
        """The vectors of the first batch by torch's plain pass, with which the runtimes are then compared."""
        start = time.thread_time()  # what the pass takes where the machine has no other work
        vectors = self.plain(inputs)
        rest = self.runtime.samples.get(self.tower.specs[0].modality, 0) / _size(inputs) - 1
        self.name = "plain"
        if (time.thread_time() - start) * rest >= WORTH_A_TRIAL or self.runtime.name not in ("auto", "torch"):
            with torch.inference_mode(False), torch.no_grad():
                trial = Trial(self.tower, _mapped(torch.clone, inputs), self.runtime)  # no tensor of inference mode
                self.name, self.forward = trial.choose(rest)
            self.note = trial.note
        return vectors


class Trial:
    """The runtimes of one tower, compared on one batch.

    `seconds` a batch and `refused` reasons are kept by runtime; "plain" is torch without changes.
    """

    def __init__(self, tower: TorchTower, inputs: Any, runtime: Runtime) -> None:
        self.tower, self.inputs, self.plain, self.runtime = tower, inputs, tower.network.forward, runtime
        self.is_exact = tower.specs[0].arithmetic == "float32"
        self.probes = list(_probes(tower, inputs))
        self.expected = [self.plain(probe).float() for probe in self.probes]
        self.seconds = {"plain": float("inf")}
        self.refused: dict[str, str] = {}
        self.note = ""
        self.store = Store(tower, runtime)

    def choose(self, rest: float) -> tuple[str, Pass]:
        """The name of the fastest runtime, or of the one asked for, and its pass, for so many batches."""
        name, changes, passes = self.runtime.name, self._faster_torch(), dict[str, Pass]()
        known = self.store.decision() if name == "auto" else {}
        asked = self._worth_trying(known, rest) if name == "auto" else {name} - {"torch"}
        asked = asked if self.is_exact else set()  # the libraries round in other places
        for other in sorted(asked):
            if (forward := self._tried(other)) is not None:
                passes[other] = forward
        fastest = min(self.seconds, key=lambda one: self.seconds[one] * WEIGHTS.get(one, FASTER))
        if asked and name == "auto" and not known:
            self.store.keep({"runtime": fastest, "seconds": self.seconds, "refused": self.refused})
        wanted = known.get("runtime", name)  # what was found once stays, whatever else the machine does now
        chosen = wanted if wanted in self.seconds and name != "torch" else fastest
        if chosen == "torch":
            changes.swap()
        self._describe(chosen)
        return chosen, passes.get(chosen, self.plain)

    def _worth_trying(self, known: Mapping[str, Any], rest: float) -> set[str]:
        """The other runtimes to try: the one that is known to be the fastest, or all that are installed."""
        if known:
            return {known["runtime"]} & set(LIBRARIES)
        start = time.thread_time()
        self.plain(self.inputs)
        left = (time.thread_time() - start) * rest * min(self.seconds.values()) / self.seconds["plain"]
        if left < WORTH_AN_EXPORT or not self.runtime.writes or importlib.util.find_spec("onnxscript") is None:
            return set()
        return {name for name in LIBRARIES if importlib.util.find_spec(name)}

    def _faster_torch(self) -> Changes:
        """The changes of `faster`, not in place, timed if they keep the numbers and save time."""
        changes = Changes()
        try:
            self._check_size()
            changes = faster(self.tower.module, self.plain, _rows(self.inputs, slice(1)))
            forward = partial(self._changed, changes)
            self._check(forward)
            self._time("torch", forward)
        except Exception as error:  # modules of other libraries may bear no change
            self.refused["torch"] = one_line(error)
        return changes

    def _changed(self, changes: Changes, inputs: Any) -> Tensor:
        changes.swap()
        try:
            return self.plain(inputs)
        finally:
            changes.swap()  # a graph is exported from the modules as they were

    def _tried(self, name: str) -> Pass | None:
        """The pass by a runtime, timed; None where it fails or differs."""
        try:
            if name == "compile":
                forward = torch.compile(self.plain)
                self._check(forward)
            else:
                forward = self._exported(name)
            self._time(name, forward)
            return forward
        except Exception as error:  # exporters and runtimes have errors of their own
            self.refused[name] = one_line(error)
            return None

    def _exported(self, name: str) -> Pass:
        """The checked pass by a runtime over the stored graph; a graph that fails is made anew once."""
        for anew in (False, True):
            with self.store.graph(self._write, anew) as (path, is_new):
                try:
                    forward = OPENED[name](path, _names(self.inputs))
                    self._check(forward)
                    return forward
                except Exception:
                    if is_new:
                        raise
        raise Refused("it could not be exported")

    def _write(self, path: Path) -> None:
        """Export the plain pass, with free numbers of samples and, where lengths differ, of tokens."""
        self._check_size()
        inputs, is_free = _rows(self.inputs, [0, -1]), self.tower.length is not None
        if is_free:  # an example of the full length would become the only one that it takes
            inputs = _mapped(lambda value: value[:, : value.shape[1] // 2 + 1], inputs)
        tensors, names = _tensors(inputs), _names(inputs)
        free = [{0: "batch"} | ({1: "length"} if is_free and tensor.ndim > 1 else {}) for tensor in tensors]
        write_onnx(TowerPart(self.tower, self.tower.network, _keys(inputs)), tensors, names, ["vectors"], free, path)

    def _check_size(self) -> None:
        """Raise `Refused` for weights of which there should be no second copy in memory or in a file."""
        if sum(tensor.numel() * tensor.element_size() for tensor in self.tower.module.parameters()) > LARGEST:
            raise Refused("its weights are too large for a copy")

    def _check(self, forward: Pass) -> None:
        """Raise `Refused` unless a pass agrees with torch's plain pass on the batch and on single samples."""
        found = [forward(probe).float() for probe in self.probes]
        if not self.is_exact:
            pairs = zip(found, self.expected, strict=True)
            cosine = min(float(nn.functional.cosine_similarity(*pair, dim=1).min()) for pair in pairs)
            if not cosine >= LEAST_COSINE:
                raise Refused(f"its cosine to torch is {cosine:.4f}, {LEAST_COSINE} is required")
            return
        worst = max(map(difference, found, self.expected))
        if not worst <= TOLERANCE:
            raise Refused(f"it differs from torch by {worst:.0e} of a row's largest value, {TOLERANCE:.0e} is allowed")

    def _time(self, name: str, forward: Pass) -> None:
        """Seconds of the batch, the least of three in turn with torch's plain pass: the machine may have other work."""
        for _ in range(ROUNDS):
            for one, run in (("plain", self.plain), (name, forward)):
                start = time.perf_counter()
                run(self.inputs)
                self.seconds[one] = min(self.seconds.get(one, float("inf")), time.perf_counter() - start)

    def _describe(self, chosen: str) -> None:
        ratio = self.seconds["plain"] / self.seconds[chosen]
        refused = [f"{TITLES[name]} is not used: {self.refused[name]}" for name in self.refused if name != "torch"]
        if refused or chosen != "plain":
            parts = [f"{TITLES[chosen]}, {ratio:.1f} x as fast as torch alone" if chosen != "plain" else "torch"]
            self.note = "; ".join(parts + refused)


class Store:
    """Where the graph of a tower and the decision for this machine lie in a cache, if anywhere."""

    def __init__(self, tower: TorchTower, runtime: Runtime) -> None:
        spec, self.runtime = tower.specs[0], runtime
        self.folder = None
        if runtime.folder is not None:
            self.folder = runtime.folder / export_name(spec.source)
        self.machine = {"processor": _processor(), "threads": torch.get_num_threads(), **versions(tuple(LIBRARIES))}
        self.name = f"{hashlib.sha256(canonical_json(self.machine).encode()).hexdigest()[:8]}.json"

    def decision(self) -> Mapping[str, Any]:
        """What an earlier trial found on this machine with these libraries; empty where there was none."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if self.folder is not None:
                known = read_json(self.folder / self.name)
                if known["runtime"] in {"plain", *TITLES}:
                    return known
        return {}

    def keep(self, decision: Mapping[str, Any]) -> None:
        """Keep a decision; a cache that cannot be written is left as it is."""
        if self.folder is not None and self.runtime.writes:
            with contextlib.suppress(WriteError):
                write_json(self.folder / self.name, {**decision, "machine": self.machine})

    @contextlib.contextmanager
    def graph(self, write: Callable[[Path], None], anew: bool) -> Iterator[tuple[Path, bool]]:
        """(path of the graph, whether `write` has just made it); outside the cache where that cannot be written."""
        path = None if self.folder is None else self.folder / GRAPH
        if path is not None and path.is_file() and not anew:
            yield path, False
        elif path is not None and self._store(write, path):
            yield path, True
        else:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder) / GRAPH)
                yield Path(folder) / GRAPH, True

    def _store(self, write: Callable[[Path], None], path: Path) -> bool:
        """Have `write` make a graph that replaces `path`; False where the cache cannot be written."""
        try:
            if not self.runtime.writes:
                return False
            with temporary_file(path) as temporary:
                temporary.touch()  # raises before the export where the folder is closed
                write(temporary)
                os.replace(temporary, path)
        except WriteError:
            return False
        return True


class TowerPart(nn.Module):
    """One tower as a module that can be exported: a list of tensors -> (B, D) vectors in float32.

    `keys` name the tensors of a tokenizer's mapping; empty for a single tensor.
    """

    def __init__(self, tower: TorchTower, network: Network, keys: Sequence[str]) -> None:
        super().__init__()
        self.module, self.keys = tower.module, keys
        self.run = network.forward

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.run(dict(zip(self.keys, inputs, strict=True)) if self.keys else inputs[0]).float()


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two (B, D) as a share of the largest value in the row; infinite for no finite number."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    largest = expected.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((found - expected).abs().amax(1) / largest).max())


def _in_onnxruntime(path: Path, names: Sequence[str]) -> Pass:
    session, taken = open_onnx(path, torch.get_num_threads())
    return lambda inputs: torch.from_numpy(session.run(None, _given(inputs, names, taken))[0])


def _in_openvino(path: Path, names: Sequence[str]) -> Pass:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 is its default where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # readers and other processes share the cores
    }
    model = core.compile_model(core.read_model(str(path)), "CPU", settings)
    request, taken = model.create_infer_request(), {port.any_name for port in model.inputs}
    return lambda inputs: torch.from_numpy(np.array(request.infer(_given(inputs, names, taken))[0]))


OPENED = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}


def _given(inputs: Any, names: Sequence[str], taken: set[str]) -> dict[str, np.ndarray]:
    pairs = zip(names, _tensors(inputs), strict=True)
    return {name: tensor.contiguous().numpy() for name, tensor in pairs if name in taken}


def _probes(tower: TorchTower, inputs: Any) -> Iterator[Any]:
    """A batch, and its first and last sample alone, without padding."""
    yield inputs
    kept = tower.keep(inputs) if tower.length is not None else None
    for row in (0, _size(inputs) - 1):
        alone = _rows(inputs, slice(row, row + 1))
        yield alone if kept is None else _mapped(partial(cut, columns=kept[row]), alone)


def _keys(inputs: Any) -> list[str]:
    return list(inputs) if isinstance(inputs, Mapping) else []


def _names(inputs: Any) -> list[str]:
    return _keys(inputs) or ["inputs"]


def _tensors(inputs: Any) -> list[Tensor]:
    return list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]


def _size(inputs: Any) -> int:
    return len(_tensors(inputs)[0])


def _rows(inputs: Any, rows: Any) -> Any:
    return _mapped(lambda value: value[rows], inputs)


def _mapped(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: function(value) for name, value in inputs.items()}
    return function(inputs)


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()
