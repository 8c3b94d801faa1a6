"""ONNX files: torch's exporter writes the files, and onnxruntime runs them to compare them with the torch module."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.errors import ConfigError, RunError
from mmfeat.system.trust import keep_private
from mmfeat.version import install_command

LARGEST = 1_500_000_000  # most bytes of weights in one protobuf file; more weights are written to a second file


def check_installed() -> None:
    """Raise `ConfigError` where a library of the exporter is missing."""
    keep_private()
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"export needs onnx, onnxscript, onnxruntime ({error}); {install_command('onnx')}") from error


def write_onnx(
    module: Any, inputs: Sequence[Any], names: Sequence[str], outputs: Sequence[str], dynamic: Sequence[Any], path: Path
) -> None:
    """Export `module`, which takes a list of tensors; `dynamic` has the free axes {axis: name} of each input."""
    import torch

    axes: dict[str, Any] = {}
    shapes = [
        {axis: axes.setdefault(name, torch.export.Dim(name, min=1)) for axis, name in free.items()} for free in dynamic
    ]
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            module,
            (list(inputs),),
            str(path),
            dynamo=True,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_shapes=(shapes,),
            external_data=size > LARGEST,
            verbose=False,
        )


def open_onnx(path: Path, threads: int = 1) -> tuple[Any, set[str]]:
    """A session of onnxruntime on the CPU, and the names of its inputs, of which the exporter may drop some."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # readers need the cores meanwhile
    options.log_severity_level = 4  # its errors are raised, too
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"], enable_fallback=False)
    return session, {port.name for port in session.get_inputs()}


def run_onnx(path: Path, names: Sequence[str], inputs: Sequence[Any]) -> list[np.ndarray]:
    """The outputs of an ONNX file for torch tensors, on one thread of the CPU."""
    session, known = open_onnx(path)
    given = {name: value.numpy() for name, value in zip(names, inputs, strict=True) if name in known}
    return list(session.run(None, given))


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest absolute difference of two arrays; raises `RunError` where `one` is not finite or the shapes differ."""
    if one.shape != other.shape or not np.isfinite(one).all():
        raise RunError(f"the exported graph gives {one.shape} where {other.shape} is right, or no finite numbers")
    return float(np.abs(one.astype(np.float64) - other).max(initial=0.0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress, warnings and logs, and turn off a fused kernel that ONNX does not have."""
    import torch

    fused = torch.backends.mha.get_fastpath_enabled()
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx", "torch._dynamo")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
