"""The long part of an evaluation, cut into chunks that any process can do, once.

A chunk is so many reference images or generated ones; what comes of it depends on its numbers alone, never
on who computes it, and the chunks are put together in their order. So the result is the same for any number
of processes (to the last bit, on a CPU with an equal number of threads in each), and finished chunks that
were kept in a folder need not be computed again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ict_fast.config import to_dict
from ict_fast.consistency import ConsistencyModel, sample_pixels
from ict_fast.consistency.sampling import BATCH_SIZE
from ict_fast.data.sources.damage import DAMAGED_ZIP
from ict_fast.durable import replacing
from ict_fast.errors import InputError
from ict_fast.evaluation.feature_networks import FeatureNetwork
from ict_fast.evaluation.reference import Images
from ict_fast.evaluation.statistics import sums, union
from ict_fast.version import __version__

GENERATED = 4 * BATCH_SIZE  # whole sampling batches, so that a chunk's images are those of one call
_REFERENCE_CHUNKS = 16  # at most: each keeps a matrix of features by features, 34 MB for Inception
_VERSION = 2  # of what a chunk's numbers mean
_DONE = "done"  # a file beside the chunks of a call that has returned

_NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}

Arrays = dict[str, np.ndarray]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Chunk:
    """Images first to first + count: of the reference if steps is 0, else sampled in so many steps."""

    steps: int
    first: int
    count: int

    @property
    def name(self) -> str:
        kind = f"{self.steps}-steps" if self.steps else "reference"
        return f"{kind}-{self.first:09d}-{self.count}"

    @property
    def cost(self) -> int:
        """Forward passes of networks."""
        return self.count * (self.steps + 1)


def generated_chunks(steps: int, count: int) -> list[Chunk]:
    return [Chunk(steps, first, min(GENERATED, count - first)) for first in range(0, count, GENERATED)]


def reference_chunks(count: int) -> list[Chunk]:
    size = max(GENERATED, -(-count // _REFERENCE_CHUNKS))
    return [Chunk(0, first, min(size, count - first)) for first in range(0, count, size)]


@dataclass
class Work:
    """Everything that chunks are computed from; picklable, so that other processes can have it."""

    model: ConsistencyModel
    network: FeatureNetwork
    labels: torch.Tensor | None
    """(count,) of the generated images, or None."""
    seed: int
    images: Images | None
    """Of the reference."""
    chosen: np.ndarray
    """Sorted numbers of the reference images whose features are kept."""
    sigmas: tuple[float, ...] | None = None
    """Noise levels of the steps after the first; None for the method's."""

    def compute(self, chunk: Chunk, device: torch.device, advance: Advance) -> Arrays:
        """A reference chunk: mean and products (see `Sums`), and the features of chosen images. A generated
        one: features, and probabilities if the network gives them.

        Args:
            device: where the model is.
            advance: called with what is done of the chunk's cost, bit by bit.
        """
        if chunk.steps == 0:
            return self._reference(chunk, device, advance)
        done = 0

        def sampled(images: int) -> None:
            nonlocal done
            advance((images - done) * chunk.steps)
            done = images

        last = chunk.first + chunk.count
        pixels = sample_pixels(
            self.model,
            chunk.count,
            steps=chunk.steps,
            sigmas=self.sigmas,
            labels=None if self.labels is None else self.labels[chunk.first : last],
            seed=self.seed,
            first=chunk.first,
            progress=sampled,
        )
        features, probabilities = self.network(pixels, device, probabilities=True)
        advance(chunk.count)
        return {
            "features": features,
            **({} if probabilities is None else {"probabilities": probabilities}),
        }

    def _reference(self, chunk: Chunk, device: torch.device, advance: Advance) -> Arrays:
        assert self.images is not None
        whole = sums(np.zeros((0, self.network.num_features)))
        kept = []
        for first in range(chunk.first, chunk.first + chunk.count, GENERATED):
            last = min(first + GENERATED, chunk.first + chunk.count)
            features, _ = self.network(self.images.array[first:last], device, probabilities=False)
            whole = union(whole, sums(features))
            inside = self.chosen[(self.chosen >= first) & (self.chosen < last)]
            kept.append(features[inside - first])
            advance(last - first)
        return {"mean": whole.mean, "products": whole.products, "features": np.concatenate(kept)}

    def key(self, reference: str, threads: int) -> str:
        """SHA-256 over everything that the chunks depend on.

        Args:
            reference: fingerprint of the reference.
            threads: of each process; on a CPU the last bits depend on them.
        """
        device = next(self.model.parameters()).device.type
        config = to_dict(self.model.config)
        about = {
            "model": weights_sha256(self.model),
            "config": [config["network"], config["method"]],
            "network": [self.network.name, self.network.sha256, self.network.batch_size],
            "labels": None if self.labels is None else _sha256(self.labels.numpy()),
            "seed": self.seed,
            "sigmas": self.sigmas,
            "reference": reference,
            "chosen": _sha256(self.chosen),
            "device": [device, threads if device == "cpu" else None],
            "sampling batch": BATCH_SIZE,
            "versions": [_VERSION, __version__, torch.__version__],
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over a model's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Finished:
    """The chunks that are done: in a folder, if there is one, else in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._arrays: dict[str, Arrays] = {}

    def missing(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Those that are still to be computed."""
        return [chunk for chunk in chunks if self._read(chunk) is None]

    def keep(self, chunk: Chunk, arrays: Arrays) -> None:
        """
        Raises:
            InputError: if the folder cannot be written; the chunks before stay.
        """
        if self.folder is None:
            self._arrays[chunk.name] = arrays
            return
        try:
            with replacing(self.folder / f"{chunk.name}.npz") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written: {error.strerror or error}; the same command continues"
                " when there is room, another --out works elsewhere"
            ) from error

    def get(self, chunk: Chunk, name: str) -> np.ndarray | None:
        """An array of a finished chunk, or None if it has none of that name."""
        arrays = self._read(chunk)
        assert arrays is not None, chunk
        return arrays.get(name)

    def joined(self, chunks: Sequence[Chunk], name: str) -> np.ndarray | None:
        """The arrays of all chunks in their order, as one."""
        parts = [self.get(chunk, name) for chunk in chunks]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]

    def are_all(self) -> None:
        """No more chunks will be asked for; see `discard_work`."""
        if self.folder is not None:
            with suppress(OSError):  # the chunks then stay
                (self.folder / _DONE).touch()

    def _read(self, chunk: Chunk) -> Arrays | None:
        if self.folder is None:
            return self._arrays.get(chunk.name)
        try:
            with (
                (self.folder / f"{chunk.name}.npz").open("rb") as file,
                np.load(file, allow_pickle=False) as archive,
            ):
                return {name: archive[name] for name in archive.files}
        except OSError:  # not there: to be computed
            return None
        except DAMAGED_ZIP:
            return None


def work_part(folder: Path, key: str) -> Path:
    """The part of a work folder that the chunks of one `Work.key` are in."""
    for done in folder.glob(f"*/{_DONE}"):
        done.unlink(missing_ok=True)  # what came of it may not have been written
    path = folder / key[:32]
    path.mkdir(exist_ok=True)
    return path


def discard_work(folder: Path) -> None:
    """Removes the chunks of the last call of `evaluate` with a work folder, if it has returned.

    Those of other calls stay, which go on from them.
    """
    for done in folder.glob(f"*/{_DONE}"):
        shutil.rmtree(done.parent, ignore_errors=True)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def number_word(number: int) -> str:
    """one to eight, then digits: as in the keys of a result."""
    return _NUMBER_WORDS.get(number, str(number))


def in_words(steps: int) -> str:
    """Such as "two steps"."""
    return f"{number_word(steps)} step{'s' if steps > 1 else ''}"
