"""Batches: halved where memory is short, without losing a row; tried out where the device is a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import Encoder, EncoderOptions
from mmfeat.errors import EncoderError
from mmfeat.extraction.encode import CPU_SIZES, PROBED_SIZES, Batcher

SHORT = """
import resource, sys
import numpy as np, torch
from mmfeat.extraction.encode import Batcher
from mmfeat.encoders import EncoderOptions, describe_encoders, load_encoders
torch.set_num_threads(1)
(encoder,) = load_encoders(describe_encoders(["timm:" + sys.argv[1]], EncoderOptions(dtype="float32")), "cpu")
random = np.random.default_rng(0)
inputs = list(random.integers(0, 256, (300, 64, 64, 3), dtype=np.uint8))
wanted = np.concatenate([encoder.embed(inputs[start : start + 20])[0] for start in range(0, 300, 20)])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
batcher = Batcher(encoder, "cpu", 300)
(found,) = batcher.launch(inputs)()
np.testing.assert_allclose(found, wanted, atol=1e-5)
print(batcher.size)
"""


@pytest.fixture
def encoder(tiny_timm: Path) -> Encoder:
    (loaded,) = load_encoders(
        describe_encoders([f"timm:{tiny_timm}"], EncoderOptions(dtype="float32", cleaning="tweet")), "cpu"
    )
    return loaded


def pictures(count: int) -> list[Any]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


def test_short_memory_halves_the_batch_and_loses_nothing(tiny_timm: Path) -> None:
    """A real limit on the process's memory, under which the whole batch does not fit."""
    command = [sys.executable, "-c", SHORT, str(tiny_timm), str(30 << 20)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert 1 <= int(answer.stdout) < 300


def test_a_sample_that_never_fits_is_one_line(encoder: Encoder) -> None:
    greedy = replace(encoder, launch=lambda batch: lambda: [torch.empty(1 << 50).numpy()])
    asking = replace(encoder, launch=lambda batch: greedy.launch(batch)() and greedy.launch(batch))
    batcher = Batcher(asking, "cpu", 8)
    with pytest.raises(
        EncoderError, match=r"timm:tiny-timm: memory is too short for a single sample \(.*\); use --dtype"
    ):
        batcher.launch(pictures(8))
    assert batcher.size == 1


def test_other_errors_are_no_lack_of_memory(encoder: Encoder) -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        Batcher(encoder, "cpu").launch([np.zeros((64, 64, 4), np.uint8)])


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_pieces_join_to_the_whole(encoder: Encoder, size: int) -> None:
    inputs = pictures(10)
    (whole,) = encoder.embed(inputs)
    (joined,) = Batcher(encoder, "cpu", size).launch(inputs)()
    np.testing.assert_allclose(joined, whole, atol=1e-5)


def test_tokens_of_pieces_join_too(tiny_timm: Path) -> None:
    options = EncoderOptions(dtype="float32", cleaning="tweet", outputs=("pooled", "tokens"))
    (encoder,) = load_encoders(describe_encoders([f"timm:{tiny_timm}"], options), "cpu")
    inputs = pictures(5)
    pooled, tokens = Batcher(encoder, "cpu", 2).launch(inputs)()
    assert len(pooled) == len(tokens) == 5
    for ours, whole in zip(tokens, encoder.embed(inputs)[1], strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


def test_a_gpu_finds_its_own_size_and_a_cpu_keeps_to_one(encoder: Encoder) -> None:
    batcher = Batcher(encoder, "cuda")  # which asks the device for nothing as long as memory suffices
    (found,) = batcher.launch(pictures(40))()
    assert batcher.size in PROBED_SIZES
    np.testing.assert_allclose(found, encoder.embed(pictures(40))[0], atol=1e-5)
    assert Batcher(encoder, "cpu").size == CPU_SIZES["image"]
