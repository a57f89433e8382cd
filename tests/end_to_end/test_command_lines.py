"""The command lines as a user runs them: main job, stops, torchrun, wrong inputs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from detection.data.shapes import make_shapes_dataset
from moco.training import checkpoint as ckpt

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/pretrain/moco_v2_200ep.yaml")
DETECTION = str(ROOT / "configs/demo/detection.yaml")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
TINY_C4 = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "10", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3",
    "SOLVER.STEPS", "(2,)", "SOLVER.WARMUP_ITERS", "1", "TEST.PRECISE_BN.NUM_ITER", "2",
    "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run(script, *arguments, launcher=()):
    line = [*launcher, *command(script, *arguments)[1 if launcher else 0 :]]
    return subprocess.run(line, capture_output=True, text=True, env=ENV, cwd="/", timeout=300)


def pretrain_arguments(images, folder, *flags, **changes):
    return ["--config-file", CONFIG, "--data", images, "--output-dir", folder, *flags,
            *tiny.overrides(**changes)]  # fmt: skip


LAST = "checkpoint_0011.pth.tar"  # of 12 epochs, long enough to be stopped in the middle


def digest(folder, name):
    return tiny.state_digest(ckpt.read_torch_file(folder / name))


def test_images_to_results(tmp_path):
    """Pretrain, convert, two trials, report: the main job on a tiny data set."""
    data = make_shapes_dataset(
        tmp_path / "shapes", num_train=6, num_test=3, num_unlabelled=16, size=64, seed=0
    )
    done = run("tools/pretrain.py", *pretrain_arguments(
        data / "unlabelled", tmp_path / "run", MODEL__ARCH="resnet50", MODEL__STEM="imagenet",
        DATA__SIZE=32, TRAIN__EPOCHS=1, LOG__TENSORBOARD=True))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    done = run("tools/convert_to_d2.py", tmp_path / "run", tmp_path / "moco.pth")
    assert done.returncode == 0, done.stderr
    assert "mapped: 265 tensors" in done.stdout
    assert (tmp_path / "moco.pth.conversion.json").is_file()
    arguments = ["--config-file", DETECTION, "--engine", "embedded", "--trials", "2", *TINY_C4,
                 "DATASETS.VOC_ROOT", data, "MODEL.WEIGHTS", tmp_path / "moco.pth",
                 "OUTPUT_DIR", tmp_path / "detection"]  # fmt: skip
    done = run("detection/train_net.py", *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "detection" / "results.json").read_text())
    assert results["num_finished"] == 2 and results["num_failed"] == 0
    assert [trial["seed"] for trial in results["trials"]] == [0, 1]
    assert all(0 <= results["mean"][score] <= 100 for score in ("AP", "AP50", "AP75"))
    text = (tmp_path / "detection" / "results.md").read_text()
    assert "±" in text and "82.4" in text
    assert (tmp_path / "detection" / "results.png").stat().st_size > 10_000
    assert (tmp_path / "detection/trial_0/pictures/contact_sheet.png").is_file()
    again = run("detection/train_net.py", *arguments)
    assert again.stdout.count("finished already") == 2
    broken = ckpt.read_torch_file(tmp_path / "moco.pth")
    broken["model"] = {n: t for n, t in broken["model"].items() if not n.startswith("res4.3.")}
    torch.save(broken, tmp_path / "broken.pth")
    arguments[-1], arguments[-3] = tmp_path / "other", tmp_path / "broken.pth"
    assert_one_line(run("detection/train_net.py", *arguments), "broken.pth", "res4.3.")


def test_a_resnet18_of_the_defaults_becomes_a_detector(tmp_path):
    """Pretrained in bfloat16, channels-last and by kernels, where the machine has them."""
    data = make_shapes_dataset(
        tmp_path / "shapes", num_train=4, num_test=2, num_unlabelled=16, size=64, seed=0
    )
    small = {
        "MODEL.ARCH": "resnet18", "MODEL.WIDTH": 0.5, "MODEL.BN_SPLITS": 2, "MOCO.QUEUE_SIZE": 16,
        "DATA.SIZE": 32, "DATA.NUM_WORKERS": 0, "TRAIN.EPOCHS": 1, "TRAIN.BATCH_SIZE": 8,
    }  # fmt: skip
    done = run("tools/pretrain.py", "--config-file", CONFIG, "--data", data / "unlabelled",
               "--output-dir", tmp_path / "run", *(w for pair in small.items() for w in pair))
    assert done.returncode == 0, done.stderr
    done = run("tools/convert_to_d2.py", tmp_path / "run", tmp_path / "moco.pth")
    assert done.returncode == 0, done.stderr
    assert "mapped: 100 tensors" in done.stdout and "DEPTH: 18" in done.stdout
    detector = {
        "MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 32, "MODEL.WEIGHTS": tmp_path / "moco.pth",
        "DATASETS.VOC_ROOT": data, "OUTPUT_DIR": tmp_path / "detection", "TEST.EVAL_PERIOD": 2,
    }  # fmt: skip
    line = ["--config-file", DETECTION, "--engine", "embedded", *TINY_C4,
            *(word for pair in detector.items() for word in pair)]  # fmt: skip
    done = run("detection/train_net.py", *line)
    assert done.returncode == 0, done.stderr
    assert "100 tensors loaded" in done.stdout and "evaluation after iteration 2" in done.stdout
    result = json.loads((tmp_path / "detection" / "result.json").read_text())
    assert result["status"] == "finished"
    assert [scores["iteration"] for scores in result["evaluations"]] == [2, 3]
    assert (tmp_path / "detection/model_best.pth.manifest.json").is_file()
    assert list((tmp_path / "detection/tensorboard").iterdir())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    base = tmp_path_factory.mktemp("stops")
    data = make_shapes_dataset(
        base / "shapes", num_train=1, num_test=1, num_unlabelled=32, size=64, seed=0
    )
    done = run("tools/pretrain.py", *pretrain_arguments(
        data / "unlabelled", base / "whole", TRAIN__EPOCHS=12))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return data / "unlabelled", digest(base / "whole", LAST)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "kill -9"])
def test_stopped_in_the_middle_and_restarted_is_bit_identical(uninterrupted, tmp_path, signum):
    images, expected = uninterrupted
    line = command("tools/pretrain.py", *pretrain_arguments(
        images, tmp_path, "--resume", DATA__NUM_WORKERS=1, TRAIN__EPOCHS=12))  # fmt: skip
    process = subprocess.Popen(line, env=ENV, cwd="/", stdout=subprocess.PIPE, text=True)
    log = tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 5,' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + 15), output
    assert not (tmp_path / LAST).exists()
    done = subprocess.run(line, env=ENV, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    assert digest(tmp_path, LAST) == expected


def test_torchrun_with_two_processes(image_folder, tmp_path):
    done = run(
        "tools/pretrain.py",
        *pretrain_arguments(image_folder, tmp_path, "--device", "cpu", TRAIN__EPOCHS=2),
        launcher=[sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                  "--standalone"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    assert "all 2 processes hold the same weights and queue" in done.stdout
    content = ckpt.read_torch_file(tmp_path / "checkpoint_0001.pth.tar")
    assert content["extra"]["world_size"] == 2
    assert torch.isfinite(content["state_dict"]["module.queue"]).all()
    alone = run("tools/pretrain.py", *pretrain_arguments(
        image_folder, tmp_path, "--resume", TRAIN__EPOCHS=2))  # fmt: skip
    assert_one_line(alone, "made with 2 processes, now there are 1")


def assert_one_line(done, *parts):
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("what", ["missing", "empty", "typo", "queue"])
def test_wrong_pretraining_inputs_are_one_line(image_folder, tmp_path, what):
    (tmp_path / "empty").mkdir()
    images = {"missing": tmp_path / "none", "empty": tmp_path / "empty"}.get(what, image_folder)
    changes = {"queue": {"MOCO__QUEUE_SIZE": 4}, "typo": {"MOCO__QUEUE_SISE": 8}}.get(what, {})
    parts = {
        "missing": [str(tmp_path / "none")],
        "empty": [str(tmp_path / "empty"), "jpg"],
        "queue": ["MOCO.QUEUE_SIZE 4", "TRAIN.BATCH_SIZE 8"],
        "typo": ["unknown key 'MOCO.QUEUE_SISE'", "did you mean 'QUEUE_SIZE'"],
    }[what]
    done = run("tools/pretrain.py", *pretrain_arguments(images, tmp_path / "run", **changes))
    assert_one_line(done, *parts)
    assert not (tmp_path / "run").exists()


def test_the_converter_refuses_another_stem(image_folder, tmp_path):
    done = run("tools/pretrain.py", *pretrain_arguments(
        image_folder, tmp_path / "run", TRAIN__EPOCHS=1, MODEL__STEM="cifar"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run("tools/convert_to_d2.py", tmp_path / "run", tmp_path / "out.pth")
    assert_one_line(done, "CIFAR stem", "7x7")
    assert not (tmp_path / "out.pth").exists()


def test_a_split_that_names_a_missing_image_is_one_line(tmp_path):
    data = make_shapes_dataset(
        tmp_path / "s", num_train=3, num_test=2, num_unlabelled=0, size=64, seed=0
    )
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    with open(broken / "ImageSets" / "Main" / "train.txt", "a") as file:
        file.write("987654\n")
    done = run("detection/train_net.py", "--config-file", DETECTION, "--engine", "embedded",
               *TINY_C4, "DATASETS.VOC_ROOT", broken, "OUTPUT_DIR", tmp_path / "out")  # fmt: skip
    assert_one_line(done, "JPEGImages/987654: image: missing")
