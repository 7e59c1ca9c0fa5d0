"""The reference policy: its log-probabilities, once a stage and kept on disk, and its weights.

A kept file names what it was computed from, and is refused where that has changed: the reference's
weights, the pairs with their images, the processor, and the precision, the first three as SHA-256
over their contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import sha256_of, write_with
from cwdpo_bench.train import processes
from cwdpo_bench.train.data import ImageSource, Masked, Pair
from cwdpo_bench.train.sources import Stored
from cwdpo_bench.train.terms import SequenceScores
from cwdpo_bench.vlm import processor_fingerprint, weights_fingerprint

REFERENCE_FILE = "reference.safetensors"

_NAMES = {
    "model": "the reference's weights",
    "pairs": "the pairs or their images",
    "processor": "the processor",
    "precision": "the precision",
}
Reference = dict[str, SequenceScores]
"""The reference policy's scores of all pairs of a stage, by view, in the pairs' order."""


class StartWeights:
    """The policy of now, kept for what must be scored under it once training has moved it.

    A copy of the trainable weights, put in their place for a moment, which is the same for full
    fine-tuning and for an adapter. To switch an adapter off would give the bare base, another
    policy wherever the stage started from an adapter.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Copy them."""
        self._kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model is the policy of the start."""
        now = [parameter.data for parameter, _ in self._kept]
        for parameter, start in self._kept:
            parameter.data = start
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._kept, now, strict=True):
                parameter.data = data


def kept_reference(
    path: Path,
    fingerprint: dict[str, str],
    views: Sequence[str],
    score: Callable[[], Reference],
) -> Reference:
    """The scores in `path`, or those that `score` computes, which are then kept there.

    Args:
        path: the stage's file.
        fingerprint: of what the scores follow from, see `reference_fingerprint`.
        views: what is scored of a pair.
        score: called where there is no file.

    Raises:
        UserError: the file was computed from something else, or is not such a file.
    """
    if processes.agreed(path.is_file()):
        return _read(path, fingerprint, views)
    reference = score()
    # Two rows a view: the sums and the means.
    columns = {view: torch.stack(scores) for view, scores in reference.items()}
    metadata = {"fingerprint": json.dumps(fingerprint)}
    with processes.first_writes() as writes:
        if writes:
            write_with(path, lambda temporary: save_file(columns, temporary, metadata=metadata))
    return reference


def _read(path: Path, fingerprint: dict[str, str], views: Sequence[str]) -> Reference:
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["fingerprint"])
            columns = {view: file.get_tensor(view) for view in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not a file of reference log-probabilities; delete it to compute them again"
        ) from error
    other = [name for key, name in _NAMES.items() if found.get(key) != fingerprint[key]]
    if columns.keys() != set(views):
        other.append("the answers that the objective scores")
    if other:
        raise UserError(
            f"{path}: these reference log-probabilities are of another run: not the same are "
            f"{', '.join(other)}; bring back what they were computed from, or delete the file to "
            "compute them again"
        )
    return {view: SequenceScores(*columns[view]) for view in views}


def reference_fingerprint(
    model: Any, processor: Any, pairs: Iterable[Pair], precision: str
) -> dict[str, str]:
    """What reference log-probabilities follow from: contents of model, pairs and processor.

    Args:
        model: the reference, adapters included.
        processor: tokenizer, image processor and chat template.
        pairs: of the stage, in order.
        precision: in words: the weights' type, autocast, and whether rows are packed.
    """
    return {
        "model": weights_fingerprint(model),
        "pairs": _of_pairs(pairs),
        "processor": processor_fingerprint(processor),
        "precision": precision,
    }


def _of_pairs(pairs: Iterable[Pair]) -> str:
    digest = hashlib.sha256()
    known: dict[ImageSource, str] = {}

    def image(source: ImageSource) -> str:
        if source not in known:
            known[source] = _of_image(source)
        return known[source]

    for pair in pairs:
        row = [
            pair.id,
            [image(source) for source in pair.images],
            [image(source) for source in pair.rejected_images or ()],
            [pair.prompt, pair.chosen, pair.rejected, pair.corrected],
        ]
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _of_image(source: ImageSource) -> str:
    if isinstance(source, Masked):
        return f"{_of_image(source.source)} masked {source.share} {source.seed}"
    if isinstance(source, Stored):
        return source.digest
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_of([source])
