"""Running a study's jobs: a failure or a crash costs only what depends on it."""

import crashing_jobs
import pytest
from study_cases import TINY, write

pytest.importorskip("gymnasium")
pytest.importorskip("pymunk")

from lapa.evaluation import study_runner
from lapa.evaluation.study import load_study
from lapa.evaluation.study_plan import Plan
from lapa.evaluation.study_report import markdown
from lapa.evaluation.study_runner import Runner, locked
from lapa.evaluation.study_table import Results, study_report


def test_two_runs_do_not_share_a_folder_at_a_time(tmp_path):
    with locked(tmp_path / "stages"), pytest.raises(ValueError, match="in use by another run"):
        with locked(tmp_path / "stages"):
            pass


def test_a_failure_costs_what_depends_on_it(tmp_path):
    """A real run, tiny: the quantizer cannot be made, Scratch is trained, played and reported all the same."""
    settings = TINY | {"quantizer_options": {"bottleneck": "by post"}}
    plan, stages = Plan(load_study(write(tmp_path, settings=settings))), tmp_path / "stages"
    runner = Runner(plan, stages, 1)
    runner.run()
    (failed,) = runner.failed
    assert failed.startswith("quantizer")
    assert "bottleneck" in next(stages.glob("quantizer-*/error.txt")).read_text(encoding="utf-8")
    report = study_report(plan, stages)
    assert set(report["cells"]) == {"scratch/in-domain/seen"}
    assert report["cells"]["scratch/in-domain/seen"]["rollouts"] == 4
    assert report["missing"] == ["lapa in-domain seed 1"]
    (error,) = report["failed"].values()
    assert list(report["failed"]) == [failed]
    assert "bottleneck" in error and f"- failed: {failed}: {error}" in markdown(report)
    assert report["expert"]["seen"]["success"] == 1.0
    assert report["do_nothing"]["seen"]["success"] == 0.0
    assert report["random"]["seen"]["rollouts"] == 4
    assert "| random actions |" in markdown(report)
    assert not list(stages.glob("**/checkpoint-*"))
    assert report["devices"] == ["cpu"]
    # What is there is not done again, and what failed is tried again.
    again = Runner(plan, stages, 1)
    assert {job.kind for job in plan.jobs.values() if not again.finished(job)} == {
        "quantizer", "codes", "pretrain", "finetune", "choose", "play",
    }  # fmt: skip


def test_a_crash_of_a_process_costs_what_depends_on_its_job(tmp_path, monkeypatch):
    monkeypatch.setattr(study_runner, "_do", crashing_jobs.do)
    monkeypatch.setattr(study_runner, "_start_worker", crashing_jobs.start)
    plan = Plan(load_study(write(tmp_path, methods=["scratch", "lapa"])))
    runner = Runner(plan, tmp_path / "stages", 2)
    runner.run()
    # Begun again, what crashed once is done; what crashes always fails, and no more than what needs it is left.
    assert [label.split()[0] for label in runner.failed] == ["labelled"]
    errors = {job.label: study_runner.error_of(runner.stages, job.key) for job in plan.jobs.values()}
    ((label, error),) = ((label, error) for label, error in errors.items() if error is not None)
    assert (label, "BrokenProcessPool" in error) == (*runner.failed, True)
    left = {job.kind for job in plan.jobs.values() if not runner.finished(job)}
    assert left == {"labelled", "finetune", "choose", "play"}
    done = {job.kind for job in plan.jobs.values() if runner.finished(job)}
    assert done >= {"video", "quantizer", "codes", "pretrain", "held_out"}


def test_a_failed_finetuning_is_named_beside_one_that_did_not_fail(tmp_path):
    settings = TINY | {"finetuning_candidates": [[2, 1e-3], [3, 1e-3]]}
    plan, stages = Plan(load_study(write(tmp_path, methods=["scratch"], settings=settings))), tmp_path / "stages"
    first, second = (job for job in plan.jobs.values() if job.kind == "finetune")
    assert first.label == second.label
    (stages / first.key).mkdir(parents=True)
    (stages / first.key / "error.txt").write_text("Traceback:\nValueError: too few\n", encoding="utf-8")
    assert Results(plan, stages).failed == {first.label: "ValueError: too few"}
