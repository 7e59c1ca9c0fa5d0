import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from cwdpo_bench.demo import base_path
from cwdpo_bench.demo.layouts import render_world
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.leaderboards import gate_reports
from cwdpo_bench.leaderboards.gate import run_gate
from cwdpo_bench.leaderboards.policy import policy_of

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
HOSTILE = "a|b`c` <script>x</script>\n::error::y %0A ]]> \x1b[31m"


@pytest.fixture
def folders(make, tmp_path):
    """Run folders for each of the gate's answers, against `base`."""

    def save(name, samples, title=None):
        tasks = {"mmmu": make.task(samples.assign(cluster=samples["id"]), "mmmu")}
        return make.save(tmp_path / name, title or name, tasks)

    small = make.choices(0.6, size=40, seed=1)
    save("base", make.choices(0.9, size=300))
    save("worse", make.choices(0.4, size=300), HOSTILE)
    save("small-base", small)
    save("small", make.choices(0.6, size=40, seed=2).assign(correct=np.arange(40) % 2 == 0))
    make.save(tmp_path / "captions", "captions", {"coco": make.task(make.captions())})
    return tmp_path


CASES = {
    "pass": ("base", "base", 0),
    "regression": ("worse", "base", 1),
    "inconclusive": ("small", "small-base", 2),
    "not judged": ("captions", "base", 3),
}


@pytest.mark.parametrize("verdict", CASES)
def test_text_says_metric_difference_interval_and_rule(folders, verdict):
    candidate, baseline, status = CASES[verdict]
    result = run_gate(folders / candidate, folders / baseline)
    assert (result.verdict, result.exit_status) == (verdict, status)
    *lines, last = gate_reports.to_text(result).splitlines()
    assert last == gate_reports.headline(result)
    assert len(lines) == len(result.checks)
    for line, check in zip(lines, result.checks, strict=True):
        assert check.verdict in line
        assert f"{check.task} {check.metric}: {check.rule}" in line
        if check.verdict != "not judged":
            assert re.search(r": [+-]\d+\.\d, 90 % interval \[[+-]?\d+\.\d, [+-]?\d+\.\d\]", line)
    if verdict == "inconclusive":
        assert re.search(r"about [\d,]+ images or questions would do \(40 now\)", lines[0])


@pytest.mark.parametrize("verdict", CASES)
def test_junit_is_xml_whose_counts_are_those_of_the_checks(folders, verdict):
    candidate, baseline, _ = CASES[verdict]
    result = run_gate(folders / candidate, folders / baseline)
    suite = ElementTree.fromstring(gate_reports.to_junit(result)).find("testsuite")
    cases = suite.findall("testcase")
    assert len(cases) == int(suite.get("tests")) == len(result.checks)
    failing = [c for c in result.checks if c.required and c.verdict not in ("pass", "not judged")]
    errors = [c for c in result.checks if c.required and c.verdict == "not judged"]
    assert int(suite.get("failures")) == len(failing) == len(suite.findall("testcase/failure"))
    assert int(suite.get("errors")) == len(errors) == len(suite.findall("testcase/error"))
    for case, check in zip(cases, result.checks, strict=True):
        assert (case.get("classname"), case.get("name")) == (check.task, check.name)


def test_what_is_inconclusive_is_skipped_where_it_passes(folders):
    result = run_gate(folders / "small", folders / "small-base", inconclusive="pass")
    suite = ElementTree.fromstring(gate_reports.to_junit(result)).find("testsuite")
    assert suite.get("failures") == "0"
    assert int(suite.get("skipped")) >= 1
    assert "::error" not in gate_reports.to_annotations(result)
    assert "::warning" in gate_reports.to_annotations(result)
    assert "(passes, as asked)" in gate_reports.headline(result)


def test_hostile_names_are_text_in_every_form(folders):
    result = run_gate(folders / "worse", folders / "base")
    summary = gate_reports.to_summary(result)
    assert "<script" not in summary
    assert not re.search(r"(?<!\\)`", summary)
    annotations = gate_reports.to_annotations(result)
    for line in annotations.splitlines():
        assert re.match(r"::(error|warning) title=[^:,\n]+::", line)
    assert "\x1b" not in gate_reports.to_text(result) + annotations + summary
    broken = run_gate(f"{folders}/{HOSTILE}", folders / "base")
    error = ElementTree.fromstring(gate_reports.to_junit(broken)).find(".//error")
    assert "<script>x</script>" in error.get("message")
    (line,) = gate_reports.to_annotations(broken).splitlines()
    assert line.startswith("::error title=could not judge::")
    assert "%250A" in line
    assert "<script" not in gate_reports.to_summary(broken)


def test_the_summary_is_a_table_of_all_checks(folders):
    result = run_gate(folders / "worse", folders / "base")
    rows = [line for line in gate_reports.to_summary(result).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(result.checks)
    assert len({row.count("|") for row in rows}) == 1
    assert "✗ regression" in rows[2]
    assert "at most 5 times in 100" in gate_reports.to_summary(result)


def test_published_baselines_are_marked_in_every_form(make, tmp_path):
    run = make.save(tmp_path / "r", "r", {"coco": make.task(make.captions())})
    rules = policy_of({"rules": [{"metric": "CIDEr", "max_drop": 0, "detect": 5}]}, "x")
    result = run_gate(run, "published:CW-DPO", rules)
    for form in (gate_reports.to_text(result), gate_reports.to_summary(result)):
        assert "there is no paired test" in form
        assert "published" in gate_reports.headline(result)


# --- the action ----------------------------------------------------------------------------------


def action_step():
    """The gate's own step of action.yml: its script, and which input fills which variable."""
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    (step,) = [step for step in action["runs"]["steps"] if step.get("id") == "gate"]
    named = {
        variable: re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", value).group(1)
        for variable, value in step["env"].items()
    }
    assert set(named.values()) <= set(action["inputs"])
    assert "${{" not in step["run"]
    defaults = {name: spec.get("default", "") for name, spec in action["inputs"].items()}
    return step["run"], named, defaults


def run_action(folder, **inputs):
    """Run the step's script as GitHub's runner does: `bash -eo pipefail`, inputs as variables."""
    script, named, defaults = action_step()
    given = {**defaults, **inputs}
    environment = {
        **os.environ,
        **{variable: str(given[name]) for variable, name in named.items()},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "GITHUB_OUTPUT": str(folder / "output"),
    }
    (folder / "step.sh").write_text(script)
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", folder / "step.sh"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("verdict", CASES)
def test_the_actions_script_ends_with_the_verdicts_status(folders, verdict):
    candidate, baseline, status = CASES[verdict]
    done = run_action(folders, candidate=candidate, baseline=baseline, junit="junit.xml")
    assert done.returncode == status, done.stderr
    assert (folders / "output").read_text() == f"verdict={verdict}\n"
    assert "| verdict |" in (folders / "summary.md").read_text()
    assert ElementTree.parse(folders / "junit.xml").getroot().tag == "testsuites"
    assert ("::error" in done.stdout) == (status != 0)


def test_the_actions_inputs_are_no_shell(folders):
    done = run_action(folders, candidate="$(touch hacked); x", baseline="base", policy="`id`")
    assert done.returncode == 3
    assert not (folders / "hacked").exists()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The demo's base on two of its benchmarks: the smoke form has too few images to judge by."""
    folder = tmp_path_factory.mktemp("demo")
    world, run = folder / "world", folder / "base"
    render_world(world, 0)
    tasks = ["coco", "mmmu"]
    run_tasks(base_path(), tasks=tasks, data_root=world, output=run, limit=60)
    return run


@pytest.mark.slow
def test_the_action_judges_the_demos_runs_as_ci_would(demo_run, tmp_path):
    base = demo_run
    alone = tmp_path / "alone"
    shutil.copytree(base, alone)
    results = json.loads((alone / "results.json").read_text())
    results["tasks"] = {"coco": results["tasks"]["coco"]}
    (alone / "results.json").write_text(json.dumps(results))
    own = 100 * results["tasks"]["coco"]["metrics"]["CIDEr"]["value"]
    # A floor far above the run's own value is missed for sure, one at that value is not settled.
    for name, floor in {"far": own + 900, "near": own}.items():
        rule = f"{{task: coco, metric: CIDEr, min_value: {floor}}}"
        (tmp_path / f"{name}.yaml").write_text(f"rules: [{rule}]")
    for candidate, policy, status in (
        (base, "", 0),
        (base, "far.yaml", 1),
        (base, "near.yaml", 2),
        (alone, "", 3),
    ):
        done = run_action(tmp_path, candidate=candidate, baseline=base, policy=policy)
        assert done.returncode == status, done.stdout + done.stderr


# --- the pytest plugin ---------------------------------------------------------------------------


def test_the_pytest_plugin_passes_and_fails_with_the_gates_text(pytester, folders):
    pytester.makepyfile(
        f"""
        def test_same(assert_no_regression):
            assert_no_regression({str(folders / "base")!r}, {str(folders / "base")!r})

        def test_worse(assert_no_regression):
            assert_no_regression({str(folders / "worse")!r}, {str(folders / "base")!r})

        def test_small(assert_no_regression):
            one, other = {str(folders / "small")!r}, {str(folders / "small-base")!r}
            assert_no_regression(one, other, inconclusive="pass")
        """
    )
    # Where the package is installed, its entry point has loaded the plugin already.
    installed = entry_points(group="pytest11", name="cwdpo_bench")
    found = pytester.runpytest_inprocess(
        *([] if installed else ["-p", "cwdpo_bench.pytest_plugin"])
    )
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines(["*regression: mmmu accuracy: max_drop 0, detect 6*"])
    found.stdout.no_fnmatch_line("*pytest_plugin.py:*")


def test_the_plugin_is_light_and_registered():
    code = "import sys, cwdpo_bench.pytest_plugin; print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pandas", "torch", "numpy", "cwdpo_bench.leaderboards"} & set(out.stdout.split())
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'cwdpo_bench = "cwdpo_bench.pytest_plugin"' in text


def test_to_json_is_strict(folders):
    from cwdpo_bench.leaderboards.gate import to_json

    result = run_gate(folders / "worse", folders / "base")
    assert json.loads(json.dumps(to_json(result), allow_nan=False))["verdict"] == "regression"
