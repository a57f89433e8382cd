"""Our configuration as Detectron2's, on stand-ins of its configuration."""

import pytest

from detection.config import get_defaults, load_detection_config
from detection.config_keys import EXTRA_KEYS
from detection.engines.d2_settings import UNDERSTOOD_KEYS, fill_config, refuse_amp, refuse_keys
from moco.cfgnode import flatten, get_key
from moco.errors import ConfigError


def theirs():
    """Detectron2's tree: what we share of it, and a key of its own."""
    node = get_defaults()
    for key in EXTRA_KEYS:
        *parents, last = key.split(".")
        parent = get_key(node, ".".join(parents))
        del parent[last]
        if not parent:
            *above, section = parents
            del (get_key(node, ".".join(above)) if above else node)[section]
    node.MODEL.META_EXTRA = "its own"
    return node


def test_keys_of_ours_only_are_known_to_the_engine_or_refused():
    assert set(UNDERSTOOD_KEYS) <= set(EXTRA_KEYS)
    refuse_keys(get_defaults())
    for key in set(EXTRA_KEYS) - set(UNDERSTOOD_KEYS):
        cfg = get_defaults()
        *parents, last = key.split(".")
        get_key(cfg, ".".join(parents))[last] = "another value"
        with pytest.raises(ConfigError, match=f"{key} is 'another value'.*--engine embedded"):
            refuse_keys(cfg)


def test_detectron2_s_own_stream_may_be_asked_for():
    refuse_keys(load_detection_config(None, ["DATALOADER.STREAM", "detectron2", "SEED", "0"]))


def test_mixed_precision_needs_a_gpu():
    cfg = load_detection_config(None, ["SOLVER.AMP.ENABLED", "True"])
    refuse_amp(cfg, "cuda")
    with pytest.raises(ConfigError, match="SOLVER.AMP.ENABLED.*on a GPU only"):
        refuse_amp(cfg, "cpu")


def test_values_and_types_are_taken_over():
    node = theirs()
    words = ["SOLVER.STEPS", "[7, 9]", "MODEL.WEIGHTS", "'123'", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    fill_config(node, load_detection_config(None, words))
    assert node.SOLVER.STEPS == (7, 9) and isinstance(node.SOLVER.STEPS, tuple)
    assert node.MODEL.WEIGHTS == "123" and node.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert node.MODEL.META_EXTRA == "its own"
    assert not set(EXTRA_KEYS) & flatten(node).keys()


def test_a_key_that_an_older_detectron2_lacks():
    node = theirs()
    del node.SOLVER["RESCALE_INTERVAL"]
    fill_config(node, get_defaults())
    cfg = load_detection_config(None, ["SOLVER.RESCALE_INTERVAL", "True"])
    with pytest.raises(ConfigError, match="RESCALE_INTERVAL is True, but the installed Detectron2"):
        fill_config(node, cfg)


@pytest.mark.detectron2
def test_detectron2_gets_all_our_values():
    get_cfg = pytest.importorskip("detectron2.config").get_cfg
    node = get_cfg()
    cfg = load_detection_config(None, ["SOLVER.STEPS", "[7, 9]", "INPUT.MIN_SIZE_TRAIN", "(64,)"])
    fill_config(node, cfg)
    for key, value in flatten(cfg).items():
        if key not in EXTRA_KEYS:
            there = get_key(node, key)
            assert type(there) is type(get_key(get_cfg(), key)) or value != get_key(get_cfg(), key)
            assert (
                (list(there) == list(value))
                if isinstance(value, list | tuple)
                else (there == value)
            )
