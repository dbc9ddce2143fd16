"""Studies: what is shared between trainings, what its jobs do, and what a report says."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from study_cases import TINY, write

pytest.importorskip("gymnasium")
pytest.importorskip("pymunk")

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.evaluation import evaluate_cli, study_cli, study_jobs, study_playing, study_worlds
from lapa.evaluation.study import METHODS, StudySettings, is_study, load_study, study_names
from lapa.evaluation.study_checks import check_models
from lapa.evaluation.study_plan import READS, Machine, Plan
from lapa.evaluation.study_report import COLOURS, markdown, table_rows, write_study_report
from lapa.evaluation.study_runner import DONE, Runner
from lapa.evaluation.study_table import Results, study_report, trends
from lapa.evaluation.study_work import Work
from lapa.training.label_latent_actions import hash_weights


def arguments(folder, suite, *more):
    """Of `lapa evaluate`."""
    return evaluate_cli.make_parser().parse_args(["--suite", suite, "--output", str(folder / "out"), *more])


def jobs_of(plan, method, column="in-domain"):
    """Jobs of the first training of a method."""
    return next(entry.jobs for entry in plan.entries if (entry.method, entry.column) == (method, column))


@pytest.mark.parametrize("name", study_names())
def test_every_study_of_the_package_loads_and_plans(name):
    study = load_study(name)
    check_models(study)
    plan = Plan(study)
    assert plan.entries
    for job in plan.jobs.values():
        assert set(job.inputs.values()) <= set(plan.jobs)
    # What nothing waits for takes no slot from what others wait for.
    assert list(plan.jobs)[-3:] == list(plan.baselines.values())


def test_an_image_tokenizer_encodes_where_it_was_trained(tmp_path, monkeypatch):
    recording = SimpleNamespace(frames=np.zeros((2, 16, 16, 3), np.uint8))
    monkeypatch.setattr(type(study_worlds.WORLDS["metaworld"]), "record", lambda self, *a, **k: recording)
    monkeypatch.setattr(study_jobs, "train_vision_tokenizer", lambda *a: [{"loss": 0.0}])
    tokenizer, devices = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(study_jobs.LapaVisionTokenizer, "from_pretrained", lambda folder: tokenizer)
    monkeypatch.setattr(
        study_jobs.stages,
        "encode_frames",
        lambda frames, model: devices.append(model.weight.device.type) or np.zeros((2, 4), int),
    )
    study_jobs.vision_tokenizer(Work.of(tmp_path, {"world": "metaworld", "families": ["reach"]}, {}, Machine("meta")))
    assert devices == ["meta"]


def test_a_quick_variant_is_smaller_and_has_a_name_of_its_own():
    full, quick = load_study("tabletop-table1"), load_study("tabletop-table1", quick=True)
    assert quick.name == "tabletop-table1-quick"
    assert quick.settings.pretraining_steps < full.settings.pretraining_steps
    assert len(quick.seeds) < len(full.seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "`seeds`"),
        ({"methods": ["laqa"]}, "`methods` must be a list out of scratch"),
        ({"splits": ["new"]}, "`splits`"),
        ({"settings": {"stepz": 1}}, "unknown fields stepz"),
        ({"columns": {"a": {"video": "robot", "labelled": "all"}}}, "columns.a.video"),
        ({"columns": {"a": {"video": "arm", "labelled": ["reach", "fly"]}}}, "columns.a.labelled"),
        ({"surprise": 1}, "nothing but"),
        ({"world": "moon"}, "`world` must be a list out of tabletop, metaworld"),
        ({"world": "metaworld"}, r"`settings.families` must be a list out of assembly, .*'separate'"),
    ],
)
def test_a_wrong_study_is_refused_with_the_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_study(write(tmp_path, **changes))


def test_each_world_has_its_own_tasks_embodiments_and_splits(tmp_path):
    elsewhere = {"world": "metaworld", "settings": {"families": ["reach"]}}
    with pytest.raises(ValueError, match="columns.in-domain.video` must be one of sawyer, got 'arm'"):
        load_study(write(tmp_path, **elsewhere))
    columns = {"in-domain": {"video": "sawyer", "labelled": "all"}}
    with pytest.raises(ValueError, match="`splits` must be a list out of seen, got"):
        load_study(write(tmp_path, **elsewhere, columns=columns, splits=["unseen"]))
    assert load_study(write(tmp_path, **elsewhere, columns=columns)).world == "metaworld"


def test_a_world_without_an_image_tokenizer_trains_one_for_all():
    plan = Plan(load_study("metaworld-mt10"))
    (tokenizer,) = [key for key, job in plan.jobs.items() if job.kind == "vision_tokenizer"]
    for job in plan.jobs.values():
        assert ("vision_tokenizer" in job.inputs) == (job.kind in ("image_tokens", "pretrain", "finetune"))
        assert job.inputs.get("vision_tokenizer", tokenizer) == tokenizer
        assert job.settings["world"] == "metaworld"


def test_a_study_in_metaworld_runs(tmp_path):
    pytest.importorskip("metaworld", reason='needs `pip install "lapa[metaworld]"`')
    from lapa.evaluation.environments.metaworld import MetaWorldEvaluation

    try:
        MetaWorldEvaluation(image_size=16).start("reach", 0)
    except ValueError as error:
        pytest.skip(str(error))
    settings = {name: value for name, value in TINY.items() if name not in ("families", "thresholds")} | {
        "families": ["drawer-close"], "video_episodes": {"drawer-close": 3}, "image_size": 32, "tokenizer_episodes": 1,
        "tokenizer_steps": 2, "tokenizer_codes": 16,
    }  # fmt: skip
    columns = {"in-domain": {"video": "sawyer", "labelled": "all"}}
    study = load_study(write(tmp_path, world="metaworld", settings=settings, columns=columns, methods=["vpt", "lapa"]))
    plan = Plan(study)
    runner = Runner(plan, tmp_path / "stages", 2, Machine(simulators=2))
    runner.run()
    assert runner.failed == {}
    report = write_study_report(plan, tmp_path / "stages", tmp_path / "out")
    assert report["complete"]
    assert (report["expert"]["seen"]["success"], report["do_nothing"]["seen"]["success"]) == (1.0, 0.0)
    tokenizers = list((tmp_path / "stages").glob("vision_tokenizer-*"))
    assert len(tokenizers) == 1


def test_models_that_cannot_be_are_named_before_anything_is_done(tmp_path):
    quantizer = write(tmp_path, points={"patch": [{"value": 8, "settings": {"quantizer_options": {"patch_size": 5}}}]})
    message = r"study tiny: method 'lapa' at patch = 8 cannot be: `image_size` \(32\) is not a multiple of `patch_size` \(5\)"
    with pytest.raises(ValueError, match=message):
        study_cli.run_study(arguments(tmp_path, quantizer))
    trunk = write(tmp_path, settings=TINY | {"num_heads": 7})
    with pytest.raises(
        ValueError, match=r"method 'scratch' cannot be: The hidden size \(96\) is not a multiple of .* \(7\)"
    ):
        study_cli.run_study(arguments(tmp_path, trunk))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["jobs", "simulators"])
def test_a_number_of_processes_below_one_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        study_cli.run_study(arguments(tmp_path, write(tmp_path), f"--{name}", "0"))


def test_a_name_that_is_a_suite_too_plays_the_policy_that_is_given(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(study_cli, "run_study", lambda args: done.append("study") or 0)
    monkeypatch.setattr(evaluate_cli, "_evaluate", lambda args: done.append("suite") or 0)
    command = ["--suite", "metaworld-mt10", "--output", str(tmp_path)]
    evaluate_cli.main([*command, "--policy", "expert"])
    evaluate_cli.main(command)
    assert done == ["suite", "study"]


def test_a_suite_is_no_study(tmp_path):
    assert is_study("tabletop-table1")
    assert is_study(write(tmp_path))
    assert not is_study("tabletop")
    assert not is_study("nothing.yaml")


def test_trainings_share_what_does_not_differ():
    plan = Plan(load_study("tabletop-table1", seeds=[1]))
    in_domain, cross_task, cross_environment = (
        {method: jobs_of(plan, method, column) for method in ("scratch", "vpt", "lapa", "actionvla")}
        for column in ("in-domain", "cross-task", "cross-environment")
    )
    # From scratch there is no video that could differ.
    assert in_domain["scratch"]["play"] == cross_environment["scratch"]["play"]
    assert in_domain["scratch"]["play"] != cross_task["scratch"]["play"]
    # Labels come after stage 2 for LAPA and ActionVLA, before it for VPT, whose labeller is trained on them.
    for method in ("lapa", "actionvla"):
        assert in_domain[method]["pretrain"] == cross_task[method]["pretrain"]
        assert in_domain[method]["pretrain"] != cross_environment[method]["pretrain"]
    assert in_domain["vpt"]["pretrain"] != cross_task["vpt"]["pretrain"]
    # All see the same recordings.
    assert in_domain["vpt"]["video"] == in_domain["lapa"]["video"] == in_domain["actionvla"]["video"]
    assert in_domain["vpt"]["labelled"] == in_domain["scratch"]["labelled"]


def test_a_setting_changes_only_the_jobs_that_read_it():
    study = load_study("tabletop-table1", seeds=[1], methods=["lapa"])
    changed = replace(study, settings=replace(study.settings, pretraining_steps=7))
    before, after = jobs_of(Plan(study), "lapa"), jobs_of(Plan(changed), "lapa")
    assert {role for role in before if before[role] != after[role]} >= {"pretrain", "choose", "play"}
    for role in ("video", "labelled", "quantizer", "targets", "image_tokens"):
        assert before[role] == after[role]


def test_every_setting_that_a_job_reads_exists():
    names = set(StudySettings.__dataclass_fields__)
    assert {name for read in READS.values() for name in read} <= names


def test_a_seed_changes_everything_but_the_held_out_episodes():
    plan = Plan(load_study("tabletop-table1", seeds=[1, 2], methods=["lapa"]))
    first, second = (next(e.jobs for e in plan.entries if e.seed == seed) for seed in (1, 2))
    assert {role for role in first if first[role] == second[role]} == {"held_out"}


def fake_play(stages, key, outcomes):
    """What a finished evaluation leaves; outcomes by cell."""
    folder = stages / key / "evaluation"
    folder.mkdir(parents=True)
    cells = [dict(zip(("group", "task"), name.split("/"))) for name in outcomes]
    rollouts = len(next(iter(outcomes.values())))
    settings = {"suite": {"name": "study", "cells": cells}, "played": {"rollouts": rollouts}}
    (folder / "evaluation.json").write_text(json.dumps(settings), encoding="utf-8")
    lines = [
        json.dumps(
            {"cell": cell, "start": 0, "rollouts": [{"success": bool(v), "seed": i} for i, v in enumerate(values)]}
        )
        for cell, values in outcomes.items()
    ]
    (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (stages / key / DONE).write_text(json.dumps({"result": {"cells": {}}, "seconds": 60.0}), encoding="utf-8")


def test_the_report_has_the_numbers_of_the_rollouts(tmp_path):
    study = load_study(write(tmp_path, seeds=[1, 2], claims=[["lapa", "scratch"]]))
    plan, stages = Plan(study), tmp_path / "stages"
    won, lost, half = [1] * 10, [0] * 10, [1] * 5 + [0] * 5
    for entry in plan.entries:
        reach = {"lapa": won, "scratch": lost}[entry.method] if entry.seed == 1 else half
        fake_play(stages, entry.jobs["play"], {"seen/reach": reach, "seen/separate": lost})
    report = study_report(plan, stages)
    lapa, scratch = report["cells"]["lapa/in-domain/seen"], report["cells"]["scratch/in-domain/seen"]
    assert (lapa["successes"], lapa["rollouts"], lapa["by_seed"]) == (15, 40, [0.5, 0.25])
    assert (scratch["successes"], scratch["by_seed"]) == (5, [0.0, 0.25])
    assert lapa["families"]["reach"]["successes"] == 15
    assert lapa["standard_error_over_tasks"] == pytest.approx(0.375)  # of 0.75 and 0
    (claim,) = report["claims"]
    assert claim["difference"]["value"] == pytest.approx(0.25)
    assert not claim["holds_over_seeds"]  # 0.5 and 0
    assert report["complete"]
    text = markdown(report)
    assert "| LAPA  | 37.5 [" in text
    assert "LAPA > Scratch" in text


def test_one_training_claims_nothing_about_others(tmp_path):
    plan, stages = Plan(load_study(write(tmp_path, claims=[["lapa", "scratch"]]))), tmp_path / "stages"
    for entry in plan.entries:
        fake_play(
            stages, entry.jobs["play"], {f"seen/{task}": [entry.method == "lapa"] * 20 for task in TINY["families"]}
        )
    (claim,) = study_report(plan, stages)["claims"]
    assert claim["difference"]["value"] == 1.0 and claim["rollout_intervals_apart"]
    assert claim["holds_over_seeds"] is None
    report = write_study_report(plan, stages, tmp_path / "out")
    assert "(paired over starts) | over seeds |" in markdown(report) and "| one training | yes |" in markdown(report)
    assert "one training" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_is_not_played_yet_is_named(tmp_path):
    study = load_study(write(tmp_path))
    plan, stages = Plan(study), tmp_path / "stages"
    fake_play(stages, jobs_of(plan, "lapa")["play"], {"seen/reach": [1, 1], "seen/separate": [0, 0]})
    report = study_report(plan, stages)
    assert not report["complete"]
    assert report["missing"] == ["scratch in-domain seed 1"]
    assert [row["method"] for row in table_rows(report)] == ["lapa"]
    assert "Not complete" in markdown(report)


def test_trends_are_per_doubling(tmp_path):
    points = {"labels": [{"value": v, "settings": {"labelled_episodes_per_family": v}} for v in (2, 4, 8)]}
    plan, stages = Plan(load_study(write(tmp_path, methods=["lapa"], points=points))), tmp_path / "stages"
    for entry in plan.entries:
        solved = {2: 2, 4: 4, 8: 6}[int(entry.point.value)]
        rows = [1] * solved + [0] * (10 - solved)
        fake_play(stages, entry.jobs["play"], {"seen/reach": rows, "seen/separate": rows})
    (trend,) = trends(Results(plan, stages))
    assert [point["success"] for point in trend["points"]] == [0.2, 0.4, 0.6]
    assert trend["per_doubling"]["value"] == pytest.approx(0.2)
    first = trend["points"][0]
    assert trend["per_doubling"]["at_1"] == pytest.approx(0.2 - 0.2 * np.log2(first["value"]))
    assert first["over_seeds"]["value"] == pytest.approx(0.2)


def test_published_numbers_stand_beside_ours(tmp_path):
    published = {"lapa": {"in-domain": [62.0]}}
    plan, stages = Plan(load_study(write(tmp_path, published=published))), tmp_path / "stages"
    for entry in plan.entries:
        fake_play(stages, entry.jobs["play"], {"seen/reach": [1], "seen/separate": [0]})
    report = study_report(plan, stages)
    assert "| LAPA (published) | 62.0 |" in markdown(report)
    assert "62.0" not in json.dumps(report["cells"])


def test_jobs_record_and_play_in_as_many_processes_as_are_given(tmp_path, monkeypatch):
    asked = []
    recording = type("Recording", (), {"lengths": np.ones(1), "frames": np.ones(2), "save": lambda self, path: None})()
    world = study_worlds.WORLDS["metaworld"]
    monkeypatch.setattr(
        type(world), "record", lambda self, *a, num_processes, **k: asked.append(num_processes) or recording
    )
    values = {"world": "metaworld", "seed": 1, "embodiment": "sawyer", "labelled": ["reach"], "families": ["reach"]}
    work = Work.of(tmp_path, values, {}, Machine(simulators=3))
    for job in (study_jobs.video, study_jobs.labelled, study_jobs.held_out):
        job(work)
    assert asked == [3, 3, 3]
    played = []
    monkeypatch.setattr(
        study_playing,
        "Evaluation",
        lambda suite, policy, folder, settings: played.append(settings) or type("E", (), {"run": lambda self: None})(),
    )
    for fragile, processes in ((2, 3), (0, 0)):
        suite = type("Suite", (), {"num_processes": lambda self, fragile=fragile: fragile})()
        study_playing._play(work, None, suite, tmp_path, 0)
        assert played[-1].num_processes == processes


@pytest.mark.parametrize(("device", "bf16"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_policies_are_trained_in_bf16_on_a_gpu(tmp_path, monkeypatch, device, bf16):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert Work.of(tmp_path, {"seed": 1}, {}, Machine(device)).schedule(1, 1e-3)["bf16"] is bf16


def test_a_study_of_several_devices_says_so(tmp_path):
    plan, stages = Plan(load_study(write(tmp_path))), tmp_path / "stages"
    for number, entry in enumerate(plan.entries):
        fake_play(stages, entry.jobs["play"], {"seen/reach": [1], "seen/separate": [0]})
        path = stages / entry.jobs["play"] / DONE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"device": ("cpu", "cuda")[number]}))
    report = study_report(plan, stages)
    assert report["devices"] == ["cpu", "cuda"]
    assert "Done on cpu, cuda: policies are trained in bf16 on a GPU" in markdown(report)


def test_labels_are_as_many_whether_of_one_family_or_of_all(tmp_path, monkeypatch):
    asked = []
    recording = type("Recording", (), {"lengths": np.ones(1), "frames": np.ones(2), "save": lambda self, path: None})()
    monkeypatch.setattr(
        study_worlds.stages, "record", lambda settings, episodes, *a, **k: asked.append(episodes) or recording
    )
    for wanted in (["reach", "separate", "relative_move"], ["separate"]):
        study_jobs.labelled(Work.of(tmp_path, {"labelled_episodes_per_family": 15, "seed": 1, "labelled": wanted}, {}))
    assert asked == [{"reach": 15, "separate": 15, "relative_move": 15}, {"separate": 45}]


def test_the_finetuning_that_solves_most_is_chosen_and_the_first_of_equals(tmp_path, monkeypatch):
    solved = {("policy-a", 0.5): 3, ("policy-a", 1.0): 5, ("policy-b", 0.5): 5, ("policy-b", 1.0): 4}

    class Played:
        def __init__(self, policy):
            self.policy = policy

        def report(self):
            return {"groups": {"seen": {"successes": solved[self.policy]}}}

    def play(world, policy, suite, folder, num_shown):
        assert suite.first_seed == study_playing.VALIDATION_SEEDS != study_playing.EVALUATION_SEEDS
        return Played(policy)

    monkeypatch.setattr(study_playing, "_open", lambda work, role, temperature: (role, temperature))
    monkeypatch.setattr(study_playing, "_play", play)
    inputs = {"policy-a": tmp_path, "policy-b": tmp_path}
    chosen = study_playing.choose(Work.of(tmp_path, {}, inputs))
    assert (chosen["policy"], chosen["temperature"]) == ("policy-a", 1.0)
    assert chosen["successes"]["policy-b-temperature-0.5"] == 5


def test_steps_that_measure_stage_2_are_of_episodes_that_it_never_saw():
    episode = np.repeat(np.arange(200), 3)
    train, test = study_jobs._split(episode)
    assert len(test) == 3 * 4  # every fiftieth of 200 episodes
    assert len(train) == len(episode) - len(test)
    assert not set(episode[train]) & set(episode[test])


TABLE_METHODS = load_study("tabletop-table1").methods
ABLATIONS = tuple(name for name in METHODS if name not in TABLE_METHODS)


@pytest.mark.parametrize(
    "methods", [TABLE_METHODS, pytest.param(ABLATIONS, marks=pytest.mark.slow)], ids=["table", "ablations"]
)
def test_every_method_is_trained_played_and_reported(tmp_path, methods):
    settings = TINY | {"video_model_steps": 2, "video_model_finetuning_steps": 2}
    plan = Plan(load_study(write(tmp_path, methods=list(methods), splits=["seen", "unseen"], settings=settings)))
    runner = Runner(plan, tmp_path / "stages", 2)
    runner.run()
    assert runner.failed == {}
    report = write_study_report(plan, tmp_path / "stages", tmp_path / "out")
    assert report["complete"]
    assert {name.split("/")[0] for name in report["cells"]} == set(methods)
    assert all(cell["rollouts"] == 4 for cell in report["cells"].values())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{METHODS[name].label} </td>" in page for name in methods)
    assert page.count("data:image/gif") >= 4 * len(methods)
    if "vpt" not in methods:
        return
    # Whose codes a policy learned is recorded, so that nobody imagines with another quantizer.
    jobs = jobs_of(plan, "lapa")
    quantizer, policy = (tmp_path / "stages" / key / "model" for key in (jobs["quantizer"], jobs["policy-2-0.001"]))
    config = LapaConfig.from_pretrained(policy)
    assert (config.quantizer_hash, config.quantizer_name) == (hash_weights(quantizer), jobs["quantizer"])
    assert config.latent_policy_hash == hash_weights(tmp_path / "stages" / jobs["pretrain"] / "model")
    said = {row["method"]: set(row) for row in report["diagnosis"]}
    assert "true motion in the codes, R²" in said["lapa"] and "pseudo actions on the video, R²" in said["vpt"]


def test_every_method_has_a_label_and_a_colour_of_its_own():
    assert set(COLOURS) == set(METHODS)
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert {"scratch", "vpt", "actionvla", "unipi", "lapa"} <= set(METHODS)
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
