"""TEST.EVAL_PERIOD: what is evaluated, kept as the best, and left as it was in training."""

import dataclasses
import json
import shutil

import pytest
import torch
from detectron2_runs import make_run
from training_runs import crash, differing, final_state, send_sigterm, stop_at

from detection.data.shapes import make_shapes_dataset
from detection.engines import evaluations
from detection.engines.base import TrainingStopped
from detection.engines.d2 import Detectron2Engine
from detection.engines.embedded.engine import EmbeddedEngine
from detection.engines.evaluations import finish_evaluations
from detection.report_evaluations import evaluations_table
from detection.scoring import score_detections
from moco.training.checkpoint import read_torch_file, verify_manifest

NUM_ITERATIONS = 3
SHORT = {
    "SOLVER__MAX_ITER": NUM_ITERATIONS,
    "SOLVER__STEPS": (2,),
    "TEST__PRECISE_BN__NUM_ITER": 1,
    "LOG__TENSORBOARD": False,
}
EVERY_ONE = {**SHORT, "TEST__EVAL_PERIOD": 1}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes_dataset(root, num_train=4, num_test=2, num_unlabelled=0, size=80, seed=0)


def finish(run):
    """What `detection.trials` does after training."""
    detections = EmbeddedEngine().predict(run, run.data.test_records)
    scores = score_detections(run.data, run.cfg, detections, None)
    return scores, finish_evaluations(run, scores)


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """An uninterrupted run that is evaluated after each iteration."""
    run = make_run(shapes, tmp_path_factory.mktemp("finished"), **EVERY_ONE)
    EmbeddedEngine().train(run)
    return run


def evaluated(run):
    return json.loads((run.output_dir / "evaluations.json").read_text())


def best_manifest(run):
    return verify_manifest(run.output_dir / "model_best.pth")


def test_evaluations_change_nothing_of_the_training(shapes, finished, tmp_path):
    """But the counters of norms, which precise batch norm moves each time."""
    run = make_run(shapes, tmp_path, **SHORT)
    EmbeddedEngine().train(run)
    found = differing(final_state(run), final_state(finished))
    assert found and all(name.endswith("num_batches_tracked") for name in found)


def test_each_period_but_the_last_is_evaluated_recorded_and_the_best_kept(
    shapes, finished, tmp_path
):
    run = dataclasses.replace(finished, output_dir=tmp_path / "run")
    shutil.copytree(finished.output_dir, run.output_dir)
    scores, fields = finish(run)
    assert [e["iteration"] for e in evaluated(finished)] == [1, 2]
    assert [e["iteration"] for e in evaluated(run)] == [1, 2, NUM_ITERATIONS]
    assert fields["evaluations"] == evaluated(run)
    assert fields["evaluations"][-1]["AP"] == scores["AP"]
    best = max(evaluated(run), key=lambda e: e["AP"])
    assert fields["best"] == {
        "iteration": best["iteration"], "AP": best["AP"], "file": "model_best.pth"
    }  # fmt: skip
    lines = (run.output_dir / "metrics.json").read_text().splitlines()
    recorded = [(r["iteration"], r["bbox/AP"]) for r in map(json.loads, lines) if "bbox/AP" in r]
    first, second, last = (e["AP"] for e in evaluated(run))
    assert recorded == [(0, first), (1, second), (NUM_ITERATIONS, last)]
    # The best model is the detector that had this score, and no state to resume from.
    (tmp_path / "again").mkdir()
    weights = run.output_dir / "model_best.pth"
    again = make_run(shapes, tmp_path / "again", eval_only=True, MODEL__WEIGHTS=weights)
    detections = EmbeddedEngine().predict(again, again.data.test_records)
    assert score_detections(again.data, again.cfg, detections, None)["AP"] == best["AP"]
    assert (finished.output_dir / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("last, expected", [(99.0, NUM_ITERATIONS), (0.0, None), (None, None)])
def test_the_last_model_becomes_the_best_only_with_a_higher_score(
    finished, tmp_path, last, expected
):
    run = dataclasses.replace(finished, output_dir=tmp_path / "run")
    shutil.copytree(finished.output_dir, run.output_dir)
    before = best_manifest(run)
    fields = finish_evaluations(run, {"AP": last, "AP50": last, "AP75": last})
    wanted = expected or before["iteration"] + 1
    assert fields["best"]["iteration"] == wanted == best_manifest(run)["iteration"] + 1
    if expected:
        kept = read_torch_file(run.output_dir / "model_best.pth")
        assert differing(kept, final_state(run)) == []
        assert {"seed", "engine", "config_digest"} <= best_manifest(run).keys()


@pytest.mark.parametrize(
    "how, error", [(send_sigterm, TrainingStopped), (crash, KeyboardInterrupt)]
)
def test_stopped_or_killed_in_between_and_resumed_equals_uninterrupted(
    shapes, finished, tmp_path, monkeypatch, how, error
):
    """SIGTERM comes before an evaluation, which is made up for; the kill within one."""
    with monkeypatch.context() as patch, pytest.raises(error):
        if how is crash:
            score = evaluations.score_detections
            calls = []

            def killed(*args):
                calls.append(args)
                return score(*args) if len(calls) < 2 else crash()

            patch.setattr(evaluations, "score_detections", killed)
        else:
            stop_at(patch, 1, how)
        EmbeddedEngine().train(make_run(shapes, tmp_path, **EVERY_ONE))
    assert [e["iteration"] for e in evaluated(finished)][:1] == [1]
    run = make_run(shapes, tmp_path, resume=True, **EVERY_ONE)
    assert [e["iteration"] for e in evaluated(run)] == [1]
    EmbeddedEngine().train(run)
    assert evaluated(run) == evaluated(finished)
    assert differing(final_state(run), final_state(finished)) == []
    states = (read_torch_file(r.output_dir / "model_best.pth") for r in (run, finished))
    assert differing(*states) == []


def test_a_run_without_the_key_has_only_the_line_of_its_end(shapes, tmp_path):
    keys = {"SOLVER__MAX_ITER": 1, "SOLVER__STEPS": (), "LOG__TENSORBOARD": False}
    run = make_run(shapes, tmp_path, **keys)
    EmbeddedEngine().train(run)
    scores, fields = finish(run)
    assert fields == {}
    assert not list(tmp_path.glob("model_best*")) and not list(tmp_path.glob("evaluations*"))
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert last == {"iteration": 1, **{f"bbox/{n}": scores[n] for n in ("AP50", "AP", "AP75")}}


def test_table_of_the_report():
    def trial(*aps, best, file="model_best.pth"):
        rows = [{"iteration": 10 * k, "AP50": 2 * ap, "AP": ap, "AP75": None}
                for k, ap in enumerate(aps, start=1)]  # fmt: skip
        best = {"iteration": best, "AP": max(aps), "file": file}
        return {"status": "finished", "evaluations": rows, "best": best}

    trials = [trial(1.0, 5.0, 4.0, best=20), {"status": "failed"}, trial(3.0, 3.0, 6.0, best=30)]
    text = evaluations_table({"trials": trials})
    assert "| 20 | 8.00 ± 2.83 | 4.00 ± 1.41 | undefined | 2 |" in text
    assert "trial 0: 5.00 after 20; trial 2: 6.00 after 30" in text
    assert "The reported figures are the last iteration's" in text
    assert evaluations_table({"trials": [{"status": "finished"}]}) == ""


@pytest.mark.detectron2
def test_both_engines_evaluate_the_same_states(shapes, tmp_path):
    pytest.importorskip("detectron2")
    theirs = make_run(shapes, tmp_path / "theirs", **EVERY_ONE)
    Detectron2Engine().train(theirs)
    ours = make_run(
        shapes, tmp_path / "ours", DATALOADER__STREAM="detectron2", SEED=3, **EVERY_ONE
    )
    EmbeddedEngine().train(ours)
    assert len(evaluated(ours)) == 2 and evaluated(ours) == evaluated(theirs)
    models = [final_state(run)["model"] for run in (ours, theirs)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    best = [read_torch_file(r.output_dir / "model_best.pth")["model"] for r in (ours, theirs)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    # Detectron2's other figures are there too, and losses are the same medians.
    lines = [(r.output_dir / "metrics.json").read_text().splitlines() for r in (ours, theirs)]
    records = [list(map(json.loads, of_run)) for of_run in lines]
    names = ("iteration", "total_loss", "loss_cls", "loss_box_reg", "lr", "bbox/AP")
    kept = [[{n: r[n] for n in names if n in r} for r in of_run] for of_run in records]
    assert kept[0] == kept[1]
    assert {"fast_rcnn/cls_accuracy", "roi_head/num_fg_samples"} <= records[1][0].keys()
