"""Several processes answer one run: shares come together, and no process waits for ever.

That their results are one process's is in `test_equality.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cwdpo_bench.evaluate.processes import ALONE, join


def _launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, "-m", *launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


SCRIPT = """
import os
import sys
from types import SimpleNamespace
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.processes import follow, join, share

fault = sys.argv[1]
processes = join()

def say(line):
    # In one write: both processes share the pipe, and `print` writes word by word.
    os.write(1, (line + "\\n").encode())

class Engine:
    name, model, signature_parts, shift_from, draws, provenance = "x", {}, {}, None, 0, {}
    chunk_size = 3

    def answer_choices(self, samples, *, max_new_tokens):
        if fault == "told" and processes.rank == 1:
            raise UserError("too little memory")
        if fault == "untold" and processes.rank == 1:
            raise ValueError("a fault of ours")
        for place, sample in reversed(list(enumerate(samples))):
            yield place, (sample.value, max_new_tokens, processes.rank)

jobs = [SimpleNamespace(samples=[SimpleNamespace(value=10 * job + place) for place in range(7)])
        for job in range(2)]
if processes.rank:
    follow(Engine(), jobs, processes)
    say("follower let go")
    raise SystemExit
if fault == "leader":
    raise SystemExit("the leader fails before it asks")
try:
    with share(Engine(), jobs, processes) as engine:
        for job in jobs:
            got = dict(engine.answer_choices(job.samples, max_new_tokens=5))
            assert sorted(got) == list(range(7)), got
            assert [got[i][0] for i in range(7)] == [s.value for s in job.samples], got
            assert {rank for _, _, rank in got.values()} == {0, 1}
        assert engine.chunk_size == 6
        say("all answered")
except (UserError, RuntimeError) as error:
    say(f"ended by {type(error).__name__} {error}")
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("none", ["all answered", "follower let go"], marks=pytest.mark.slow),
        ("told", ["ended by UserError too little memory", "follower let go"]),
        pytest.param(
            "untold",
            ["ended by RuntimeError in process 1", "a fault of ours", "follower let go"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_shares_come_together_and_what_ends_one_ends_all(
    fault: str, said: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = _launch(script, fault)
    assert done.returncode == 0, done.stderr[-3000:]
    for words in said:
        assert words in done.stdout


@pytest.mark.slow
def test_a_leader_that_is_gone_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert _launch(script, "leader").returncode == 1


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == ALONE
