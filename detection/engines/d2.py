"""The Detectron2 engine: Detectron2's own model, loaders, trainer, precise batch norm, evaluators.

It and `d2_scores` alone import Detectron2, and only when the engine is used. What it adds round
Detectron2's parts: strict weights, checkpoints that verify, one progress output, an orderly stop.
Checkpoints have Detectron2's names and layout. As in Detectron2, a resumed run has the model, the
optimizer and the schedule of the stopped one, but its data stream and random numbers start anew,
so it does not equal an uninterrupted run; and the image order depends on DATALOADER.NUM_WORKERS.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import PIL
import torch
import torch.distributed as dist

from detection.config_keys import has_basic_blocks
from detection.data.loader import batch_share, usable_records
from detection.data.masks import encode_rle
from detection.engines import d2_problems, d2_session, session
from detection.engines.base import FINAL_MODEL, Detections, Run
from detection.engines.d2_scores import SCORES, UNREADABLE, coco_scores, registered, voc_scores
from detection.engines.d2_session import (
    CheckedLosses,
    CheckedMapper,
    loader_errors_in_one_line,
    logs_to_file,
)
from detection.engines.d2_settings import fill_config, refuse_amp, refuse_keys, refuse_widths
from detection.weights_file import find_weights, read_weights_file
from moco import distributed
from moco.cfgnode import CfgNode
from moco.errors import CheckpointError, ConfigError
from moco.training.checkpoint import verify_manifest


class Detectron2Engine:
    """See `detection.engines.base.Engine`."""

    name = d2_session.ENGINE

    def versions(self) -> dict[str, str]:
        import detectron2

        versions = session.torch_versions()
        return {**versions, "detectron2": detectron2.__version__, "pillow": PIL.__version__}

    def unavailable_reason(self) -> str | None:
        if distributed.world_size() > 1 and dist.get_backend() != "nccl":
            return d2_problems.on_the_cpu(distributed.world_size())
        try:
            _import_all()
        except Exception as error:  # a package compiled for another torch may raise anything
            return d2_problems.explain(error)
        outdated = d2_problems.outdated(d2_problems.installed_at())
        return f"Detectron2 cannot be used; {'; '.join(outdated)}" if outdated else None

    def check(self, cfg: CfgNode, *, eval_only: bool) -> str:
        refuse_keys(cfg)
        refuse_widths(cfg)
        if not eval_only:
            refuse_amp(cfg, "cuda" if torch.cuda.is_available() else "cpu")
        with logs_to_file(None):
            theirs = _detectron2_cfg(cfg)
            model = _build_model(theirs)
            _check_schedule(theirs, model)
            return _load_weights(model, cfg, eval_only=eval_only)

    def train(self, run: Run) -> None:
        refuse_amp(run.cfg, run.process.device.type)
        batch_share(run.cfg, run.process.world_size)
        usable_records(run.data.train_records, run.cfg)
        path = session.state_to_resume(run) if run.resume else None
        if path is not None and session.is_complete(run, path):
            return
        with logs_to_file(run), loader_errors_in_one_line():
            trainer = _build_trainer(run)
            if path is None:
                _load_weights(trainer.checkpointer.model, run.cfg, eval_only=False)
            else:
                d2_session.resume(run, trainer, path)
            d2_session.train(run, trainer)
        distributed.barrier()

    def predict(self, run: Run, records: Sequence[dict]) -> Detections:
        if not records:
            return {}
        with logs_to_file(run), loader_errors_in_one_line():
            return _predict(_trained(run), run, records)

    def detector(self, run: Run) -> Callable[[dict], tuple]:
        with logs_to_file(run):
            model, mapper = _trained(run), _test_mapper(run)

        def detect_quietly(record: dict) -> tuple:
            with logs_to_file(run):
                return _detect(model, mapper(record), run)

        return detect_quietly

    def second_opinion(self, run: Run, records: Sequence[dict], detections: Detections) -> dict:
        """The scores by Detectron2's own evaluator, in percent; call it on every rank.

        Returns: on rank 0 {"AP", "AP50", "AP75"} and, with masks, "segm": the same of masks.
            Where the evaluator fails, the three are None and "reason" says why. Elsewhere {}.
        """
        evaluate = coco_scores if run.data.metric == "coco" else voc_scores
        try:
            with logs_to_file(run), contextlib.redirect_stdout(io.StringIO()):
                return evaluate(run, records, detections)
        except UNREADABLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        session.say(run, f"Detectron2's own evaluator gives no score: {reason}")
        return {**dict.fromkeys(SCORES), "reason": reason}


def _import_all() -> None:
    """Everything of Detectron2 that this file uses, its compiled operators included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what newer packages will remove
        import detectron2
        import detectron2._C
        import detectron2.checkpoint
        import detectron2.config
        import detectron2.data
        import detectron2.engine
        import detectron2.evaluation
        import detectron2.modeling
        import detectron2.solver  # noqa: F401

    _register_heads()


def _register_heads() -> None:
    """Make more MODEL.ROI_HEADS.NAME known to Detectron2, once a process.

    Res5ROIHeadsExtraNorm, those of MoCo's benchmark, have one more norm at the end of res5 (MoCo
    v1, appendix; the reference's detection/train_net.py). ...BasicBlocks are for depth 18 and 34:
    the res5 of Detectron2's own heads has bottlenecks, which a pretrained layer4 does not fit.
    """
    from detectron2.layers import get_norm
    from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

    class Res5ROIHeadsBasicBlocks(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg):
            options = cfg.MODEL.RESNETS
            width, num_blocks = options.RES2_OUT_CHANNELS * 8, 2 if options.DEPTH == 18 else 3
            blocks = ResNet.make_stage(
                BasicBlock, num_blocks, in_channels=width // 2, out_channels=width,
                stride_per_block=[2] + [1] * (num_blocks - 1), norm=options.NORM,
            )  # fmt: skip
            return torch.nn.Sequential(*blocks), width

    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg):
            res5, channels = super()._build_res5_block(cfg)
            res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
            return res5, channels

    class Res5ROIHeadsExtraNormBasicBlocks(Res5ROIHeadsExtraNorm, Res5ROIHeadsBasicBlocks):
        pass

    for heads in (
        Res5ROIHeadsExtraNorm, Res5ROIHeadsBasicBlocks, Res5ROIHeadsExtraNormBasicBlocks
    ):  # fmt: skip
        if heads.__name__ not in ROI_HEADS_REGISTRY:
            ROI_HEADS_REGISTRY.register(heads)


def _detectron2_cfg(cfg: CfgNode, run: Run | None = None):
    """Detectron2's configuration for a run, or for a check on the CPU; see `fill_config`."""
    from detectron2.config import get_cfg

    theirs = get_cfg()
    fill_config(theirs, cfg)
    theirs.MODEL.DEVICE = "cpu" if run is None else str(run.process.device)
    if has_basic_blocks(cfg):
        theirs.MODEL.ROI_HEADS.NAME += "BasicBlocks"
    if run is not None:
        theirs.OUTPUT_DIR, theirs.SEED = str(run.output_dir), run.seed
    return theirs


def _build_model(theirs) -> torch.nn.Module:
    from detectron2.modeling import build_model

    _register_heads()
    return build_model(theirs)


def _load_weights(model: torch.nn.Module, cfg: CfgNode, *, eval_only: bool) -> str:
    """Load cfg.MODEL.WEIGHTS by Detectron2's checkpointer, held to what the strict loader says.

    Returns what was loaded. Raises: CheckpointError, also where theirs loads anything otherwise.
    """
    from detectron2.checkpoint import DetectionCheckpointer

    class SafeCheckpointer(DetectionCheckpointer):
        def _load_file(self, filename):
            # Its own reader would unpickle a .pkl, which can run code.
            kept = {n: t for n, t in read_weights_file(filename).tensors.items() if n not in reset}
            return {"model": kept, "matching_heuristics": True}

    if not cfg.MODEL.WEIGHTS:
        return session.load_initial_weights(model, cfg, eval_only=eval_only)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = session.load_weights_file(model, cfg, eval_only=eval_only)
    reset = {tensor.source for tensor in report.reset}
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(initial)
    SafeCheckpointer(model).load(str(find_weights(cfg.MODEL.WEIGHTS)))
    wrong = [name for name, t in model.state_dict().items() if not torch.equal(t, wanted[name])]
    if wrong:
        raise CheckpointError(
            f"{cfg.MODEL.WEIGHTS}: Detectron2 loads {len(wrong)} tensors otherwise than the file "
            f"says ({', '.join(wrong[:3])} ...); convert the file again, or use --engine embedded"
        )
    return report.words()


def _check_schedule(theirs, model: torch.nn.Module) -> None:
    """Raise ConfigError for a learning-rate schedule that Detectron2 cannot build."""
    from detectron2.solver import build_lr_scheduler, build_optimizer

    try:
        build_lr_scheduler(theirs, build_optimizer(theirs, model))
    except (AssertionError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"SOLVER: Detectron2 cannot build this learning-rate schedule ({reason}); allowed: "
            "ascending STEPS other than MAX_ITER, BASE_LR_END from 0 to BASE_LR; change them"
        ) from error


def _build_trainer(run: Run):
    """Detectron2's DefaultTrainer, with our hook in place of its writers and checkpoints.

    Source of the order of construction and hooks, and of the seeds: detectron2/engine/defaults.py.
    """
    from detectron2.data import DatasetMapper, build_detection_train_loader
    from detectron2.engine import DefaultTrainer, hooks
    from detectron2.utils import comm
    from detectron2.utils.env import seed_all_rng

    class Trainer(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg):
            return _build_model(cfg)

        @classmethod
        def build_train_loader(cls, cfg):
            mapper = CheckedMapper(DatasetMapper(cfg, True), run.cfg.INPUT.MAX_IMAGE_PIXELS)
            return build_detection_train_loader(cfg, mapper=mapper)

        def build_writers(self):
            return []

        def build_hooks(self):
            own = super().build_hooks()
            self.precise_bn = next((h for h in own if isinstance(h, hooks.PreciseBN)), None)
            kept = [h for h in own if isinstance(h, hooks.IterationTimer | hooks.LRScheduler)]
            after_step = partial(d2_session.after_step, run)
            begin = hooks.CallbackHook(before_step=lambda trainer: trainer.progress.begin())
            return [begin, *kept, hooks.CallbackHook(after_step=after_step)]

    if run.process.world_size > 1:  # as its launcher does; a repeated call does nothing
        comm.create_local_process_group(d2_session.processes_per_machine(run.process))
    torch.backends.cudnn.benchmark = run.cfg.CUDNN_BENCHMARK
    seed_all_rng(run.seed + run.process.rank)
    theirs = _detectron2_cfg(run.cfg, run)
    with registered(run, "training data", run.data.train_records) as name:
        theirs.DATASETS.TRAIN = (name,)
        trainer = Trainer(theirs)
    trainer.losses = trainer._trainer.model = CheckedLosses(run, trainer)
    trainer.predict = partial(_predict_in_training, trainer.checkpointer.model, run)
    return trainer


def trainer_parts(run: Run) -> tuple:
    """For tools/benchmark.py: (model with the initial weights, optimizer, iterator of training
    batches, test mapper: record -> input of the model, context that training needs)."""
    from detectron2.data import DatasetMapper
    from detectron2.utils.events import EventStorage

    trainer = _build_trainer(run)
    model = trainer.checkpointer.model
    _load_weights(model, run.cfg, eval_only=False)
    mapper = DatasetMapper(_detectron2_cfg(run.cfg, run), False)
    return model, trainer.optimizer, iter(trainer.data_loader), mapper, EventStorage()


def _test_mapper(run: Run) -> CheckedMapper:
    from detectron2.data import DatasetMapper

    mapper = DatasetMapper(_detectron2_cfg(run.cfg, run), False)
    return CheckedMapper(mapper, run.cfg.INPUT.MAX_IMAGE_PIXELS)


def _trained(run: Run) -> torch.nn.Module:
    """The detector of the run, or of MODEL.WEIGHTS with `run.eval_only`, in eval mode."""
    refuse_keys(run.cfg)
    refuse_widths(run.cfg)
    model = _build_model(_detectron2_cfg(run.cfg, run))
    if run.eval_only:
        _load_weights(model, run.cfg, eval_only=True)
    else:
        path = run.output_dir / FINAL_MODEL
        verify_manifest(path)
        d2_session.load_model(run, path, model)
    return model.eval()


def _predict(model: torch.nn.Module, run: Run, records: Sequence[dict]) -> Detections:
    """The detections of all records by a model in eval mode, on every rank."""
    from detectron2.data import build_detection_test_loader

    loader = build_detection_test_loader(
        list(records), mapper=_test_mapper(run), num_workers=run.cfg.DATALOADER.NUM_WORKERS
    )
    detections = {}
    for number, (sample,) in enumerate(loader, start=1):
        detections[sample["image_id"]] = _detect(model, sample, run)
        if number % 500 == 0 or number == len(loader):
            session.say(run, f"predicted {number}/{len(loader)} images of rank 0")
    return session.gather_detections(detections, run.process)


def _predict_in_training(model: torch.nn.Module, run: Run) -> Detections:
    from detectron2.evaluation import inference_context

    with inference_context(model):
        return _predict(model, run, run.data.test_records)


@torch.no_grad()
def _detect(model: torch.nn.Module, sample: dict, run: Run) -> tuple:
    """The entry of one test sample in `Detections`."""
    found = model([sample])[0]["instances"].to("cpu")
    boxes = found.pred_boxes.tensor.numpy()
    detected = boxes, found.scores.numpy(), found.pred_classes.numpy()
    if run.cfg.MODEL.MASK_ON:
        detected += (encode_rle(found.pred_masks.numpy()),)
    return detected
