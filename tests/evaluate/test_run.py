import json
import shutil
import subprocess
import sys

import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate import run as run_module
from cwdpo_bench.evaluate.diversity import diversity_columns
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.metrics import DIVERSITY
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.progress import progress_bar

CAPTION_METRICS = {
    *("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "CIDEr-plain"),
    *("entropy", "top1_probability", "token_ece", "tv", "js"),
}
CHOICE_METRICS = {
    *("accuracy", "accuracy_option", "parse_failures", "ece", "ece_adaptive", "ece_debiased"),
    *("mce", "brier", "nll", "aurc", "entropy", "top1_probability", "ece_classwise"),
    *("brier_reliability", "brier_resolution", "brier_uncertainty", "option_mass", "temperature"),
    *("ece_scaled", "ece_adaptive_scaled", "ece_debiased_scaled", "mce_scaled", "brier_scaled"),
    "nll_scaled",
}
CIRCULAR_METRICS = {
    *("accuracy_plain", "accuracy_option_shift_mean", "ece_shift_mean", "brier_shift_mean"),
    *("nll_shift_mean", "option_order_bias", "option_recall_sd"),
}


@pytest.fixture(scope="module")
def whole_run(tiny_model_folder, data_root_once, tmp_path_factory):
    """All five tasks with the model itself as the reference."""
    return run_tasks(
        tiny_model_folder,
        tasks=None,
        data_root=data_root_once,
        output=tmp_path_factory.mktemp("runs") / "all",
        reference_model=tiny_model_folder,
    )


def _no_work(*args, **kwargs):
    raise AssertionError("the model answered")


def test_a_run_leaves_a_folder_that_reads_back_whole(whole_run):
    again = read_run(whole_run.path)

    assert again.results == whole_run.results
    assert list(again.results["tasks"]) == ["coco", "flickr30k", "nocaps", "mmmu", "mmbench"]
    assert {name: task["n"] for name, task in again.results["tasks"].items()} == {
        "coco": 3,
        "flickr30k": 2,
        "nocaps": 3,
        "mmmu": 4,
        "mmbench": 2,
    }


@pytest.mark.parametrize("task", ["coco", "flickr30k", "nocaps"])
def test_captions_have_their_metrics(whole_run, task):
    metrics = whole_run.results["tasks"][task]["metrics"]

    assert set(metrics) - {"SPICE"} == CAPTION_METRICS
    assert metrics["tv"]["value"] == pytest.approx(0, abs=1e-5)


def test_choices_have_their_metrics(whole_run):
    tasks = whole_run.results["tasks"]

    # AUROC is there unless all answers are right, or all wrong.
    assert set(tasks["mmmu"]["metrics"]) - {"auroc"} == CHOICE_METRICS
    assert set(tasks["mmbench"]["metrics"]) - {"auroc"} == CHOICE_METRICS | CIRCULAR_METRICS


def test_groups_are_those_of_the_benchmarks(whole_run):
    groups = {name: set(t["groups"]) for name, t in whole_run.results["tasks"].items()}

    assert groups == {
        "coco": set(),
        "flickr30k": set(),
        "nocaps": {"in-domain", "near-domain", "out-domain"},
        "mmmu": {"Art and Design", "Art", "Science", "Math"},
        "mmbench": {"colour", "attribute", "count", "reasoning"},
    }


def test_samples_hold_what_was_asked_and_answered(whole_run):
    captions, questions = whole_run.samples("coco"), whole_run.samples("mmbench")

    assert list(captions["id"]) == ["101", "102", "103"]
    assert captions["prompt"].unique().tolist() == [
        "Provide a one-sentence caption for the provided image."
    ]
    assert captions["prediction"].map(type).eq(str).all()
    assert list(questions["cluster"]) == ["7", "7", "7", "9", "9"]
    assert list(questions["shift"]) == [0, 1, 2, 0, 1]
    assert questions["option_log_probabilities"].map(len).tolist() == [3, 3, 3, 2, 2]


def test_an_open_question_has_no_option_probabilities(whole_run):
    samples = whole_run.samples("mmmu").set_index("question_type")

    assert samples.loc["open", "option_log_probabilities"] is None


def test_the_signature_names_what_changes_a_score(whole_run):
    shared = whole_run.results["signature"]
    task = whole_run.results["tasks"]["mmmu"]["signature"]

    assert "dtype:float32" in shared
    assert "longest_edge=7056" in shared
    for part in ("task:mmmu", "split:validation", "limit:none", "max_new_tokens:128", "greedy"):
        assert part in task


def test_provenance_names_data_device_and_versions(whole_run, data_root_once):
    provenance = whole_run.results["provenance"]

    assert provenance["device"] in ("cpu", "cuda:0")
    assert set(provenance["data_sha256"]) == set(whole_run.results["tasks"])
    assert provenance["libraries"]["transformers"].startswith("5.")
    timings = json.loads((whole_run.path / "timings.json").read_text())
    assert {name: timing["samples"] for name, timing in timings.items()} == {
        name: len(whole_run.samples(name)) for name in whole_run.results["tasks"]
    }
    assert all(timing["seconds"] > 0 for timing in timings.values())


def test_the_same_run_gives_the_same_numbers(
    whole_run, tiny_model_folder, data_root_once, tmp_path
):
    again = run_tasks(
        tiny_model_folder,
        tasks=["mmbench"],
        data_root=data_root_once,
        output=tmp_path / "again",
        batch_size=2,
    )

    one, other = whole_run.samples("mmbench"), again.samples("mmbench")
    assert list(one["prediction"]) == list(other["prediction"])
    metrics = whole_run.results["tasks"]["mmbench"]["metrics"]
    # Batches of another size round differently: log-probabilities are equal to 1e-4, and so, as
    # shares of themselves, are the probabilities that most of these are made of, in percent.
    for name, metric in again.results["tasks"]["mmbench"]["metrics"].items():
        assert metric["value"] == pytest.approx(metrics[name]["value"], rel=1e-4, abs=1e-4)


def test_a_limit_takes_the_first_questions_in_all_orders(
    tiny_model_folder, data_root_once, tmp_path
):
    folder = run_tasks(
        tiny_model_folder, tasks=["mmbench"], data_root=data_root_once, output=tmp_path, limit=1
    )

    assert list(folder.samples("mmbench")["id"]) == ["7-0", "7-1", "7-2"]
    assert "|limit:1|" in folder.results["tasks"]["mmbench"]["signature"]


def test_default_tasks_that_are_missing_are_told_and_the_rest_run(
    tiny_model_folder, data_root, tmp_path, capsys
):
    for name in ("coco", "flickr30k", "nocaps", "mmmu"):
        shutil.rmtree(data_root / name)

    folder = run_tasks(tiny_model_folder, tasks=None, data_root=data_root, output=tmp_path / "run")

    assert list(folder.results["tasks"]) == ["mmbench"]
    not_run = folder.results["provenance"]["not_run"]
    assert folder.results["provenance"]["checkpoint"] == str(tiny_model_folder.resolve())
    assert [line.split(" ")[0] for line in not_run] == ["coco", "flickr30k", "nocaps", "mmmu"]
    assert "caption_datasets.zip" in not_run[0]
    assert "hf download MMMU/MMMU" in capsys.readouterr().err


@pytest.fixture
def refused(monkeypatch, tiny_model_folder, data_root, tmp_path):
    """Runs that must be refused before the model answers anything or a file is written."""
    monkeypatch.setattr(InProcessEngine, "answer_captions", _no_work)
    monkeypatch.setattr(InProcessEngine, "answer_choices", _no_work)

    def attempt(match, **arguments):
        settings = {
            "tasks": ["coco"],
            "data_root": data_root,
            "output": tmp_path / "run",
            **arguments,
        }
        with pytest.raises(UserError, match=match):
            run_tasks(tiny_model_folder, **settings)
        assert not (tmp_path / "run").exists()

    return attempt


def test_a_named_task_that_is_missing_is_refused_without_lmms_eval(refused, data_root, monkeypatch):
    shutil.rmtree(data_root / "coco")
    monkeypatch.setattr("cwdpo_bench.evaluate.choosing.is_installed", lambda: False)

    refused(
        r"coco is not run: its data are not under .*val2014.zip.*cwdpo-bench\[lmms\]",
        tasks=["coco", "mmbench"],
    )


def test_a_root_without_any_benchmark_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()

    refused("(?s)coco is not run.*mmbench is not run", tasks=None, data_root=tmp_path / "empty")


def test_an_unknown_task_names_the_nearest(refused):
    refused("unknown task 'noocaps'; did you mean 'nocaps'", tasks=["noocaps"])


def test_a_missing_data_root_is_refused(refused, tmp_path):
    refused("nowhere: no such folder", data_root=tmp_path / "nowhere")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(refused, limit):
    refused("limit must be 1 or more", limit=limit)


def test_a_batch_size_below_one_is_refused(refused):
    refused("batch size must be 1 or more", batch_size=0)


def test_a_missing_image_is_refused(refused, data_root):
    (data_root / "coco/val2014/COCO_val2014_000000000003.jpg").unlink()

    refused(r"sample 103: image .*000000000003\.jpg does not exist")


def test_an_image_path_that_leaves_the_root_is_refused(refused, data_root):
    path = data_root / "coco/dataset_coco.json"
    path.write_text(path.read_text().replace("COCO_val2014_000000000003.jpg", "../../../x.jpg"))

    refused("sample 103: image path .* leaves the data folder")


def test_a_broken_java_home_is_refused(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))

    refused("JAVA_HOME=.*unset JAVA_HOME")


def test_an_output_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")

    refused("file: is a file; name another output", output=tmp_path / "file" / "run")


def test_an_output_that_cannot_be_written_is_refused(refused, monkeypatch):
    monkeypatch.setattr(run_module.os, "access", lambda path, mode: False)
    monkeypatch.delenv("JAVA_HOME", raising=False)

    refused("cannot be written; mend its rights")


def test_doubled_ids_are_refused(refused, data_root):
    path = data_root / "coco/dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"][2]["cocoid"] = 101
    path.write_text(json.dumps(content))

    refused(r"dataset_coco\.json: id '101' is doubled")


def test_another_models_run_folder_is_refused_before_any_work(
    tiny_model_folder, data_root_once, tmp_path, monkeypatch
):
    arguments = {"tasks": ["mmbench"], "data_root": data_root_once, "output": tmp_path, "limit": 1}
    run_tasks(tiny_model_folder, model_name="first", **arguments)
    before = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr(InProcessEngine, "answer_choices", _no_work)

    with pytest.raises(UserError, match=r"holds another run.*'first'.*choose another output"):
        run_tasks(tiny_model_folder, model_name="second", **arguments)
    with pytest.raises(UserError, match=r"holds another run.*limit"):
        run_tasks(tiny_model_folder, model_name="first", **{**arguments, "limit": 2})
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_failed_run_leaves_nothing(tiny_model_folder, data_root, tmp_path):
    (data_root / "coco/val2014/COCO_val2014_000000000003.jpg").write_bytes(b"")

    with pytest.raises(UserError, match=r"sample 103: image .* broken"):
        run_tasks(tiny_model_folder, tasks=["coco"], data_root=data_root, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_empty_replies_are_counted_in_a_warning(
    tiny_model_folder, data_root_once, tmp_path, monkeypatch, capsys
):
    answer_choices = InProcessEngine.answer_choices

    def silent(*args, **kwargs):
        replies = answer_choices(*args, **kwargs)
        return ((place, answer._replace(text="")) for place, answer in replies)

    monkeypatch.setattr(InProcessEngine, "answer_choices", silent)

    folder = run_tasks(
        tiny_model_folder, tasks=["mmbench"], data_root=data_root_once, output=tmp_path
    )

    task = folder.results["tasks"]["mmbench"]
    assert task["warnings"][0] == "5 of 5 replies are empty"
    assert "mmbench: 5 of 5 replies are empty" in capsys.readouterr().err
    assert task["metrics"]["accuracy"]["value"] == 0
    assert task["metrics"]["parse_failures"]["value"] == 1


def test_a_callers_own_display_is_drawn_on(tiny_model_folder, data_root_once, tmp_path):
    with progress_bar() as bars:
        run_tasks(
            tiny_model_folder,
            tasks=["mmbench"],
            data_root=data_root_once,
            output=tmp_path,
            bars=bars,
        )

    assert [(bar.description, bar.completed) for bar in bars.tasks] == [("mmbench", 5)]


def test_diversity_of_drawn_captions_stands_beside_the_scores(
    tiny_model_folder, data_root_once, tmp_path
):
    folder = run_tasks(
        tiny_model_folder, tasks=["coco"], data_root=data_root_once, output=tmp_path, diversity=3
    )

    task = folder.results["tasks"]["coco"]
    assert "drawn:3@temperature1" in task["signature"]
    rows = folder.samples("coco")
    for name in DIVERSITY:
        assert task["metrics"][name]["value"] == pytest.approx(rows[name].mean())
        assert task["metrics"][name]["higher_is_better"] is None
    texts = dict(zip(rows["id"], map(list, rows["drawn"]), strict=True))
    references = dict(zip(rows["id"], map(list, rows["references"]), strict=True))
    assert {len(captions) for captions in texts.values()} == {3}
    assert rows["vendi"].tolist() == diversity_columns(references, texts)["vendi"]


@pytest.mark.parametrize("diversity", [-1, 1])
def test_one_drawn_caption_is_refused(tiny_model_folder, data_root_once, tmp_path, diversity):
    with pytest.raises(UserError, match="2 captions an image or more"):
        run_tasks(
            tiny_model_folder,
            tasks=["coco"],
            data_root=data_root_once,
            output=tmp_path,
            diversity=diversity,
        )


def test_tasks_and_prompts_load_without_torch():
    code = (
        "import sys\n"
        "from cwdpo_bench.evaluate.tasks import caption_prompt, mmbench_prompt, mmmu_prompt\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_precision_is_in_the_signature_and_keeps_runs_apart(
    tiny_model_folder, data_root_once, tmp_path
):
    def run(dtype):
        return run_tasks(
            tiny_model_folder,
            tasks=["mmbench"],
            data_root=data_root_once,
            output=tmp_path / "run",
            dtype=dtype,
        )

    assert "|dtype:bfloat16|" in run("bfloat16").results["signature"]
    with pytest.raises(UserError, match=r"holds another run.*dtype"):
        run("float32")
