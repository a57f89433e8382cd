"""The method cards in docs/methods: each method has one, and their snippets run."""

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.methods import BUILDERS
from moco.training import checkpoint as ckpt

ROOT = Path(__file__).parents[3]
CARDS = sorted((ROOT / "docs/methods").glob("*.md"))


def blocks(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", card.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(32):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def test_every_method_has_a_card_that_names_its_configs():
    text = {card: card.read_text() for card in CARDS}
    for method in BUILDERS:
        assert any(f"`METHOD: {method}`" in card for card in text.values()), method
    for config in (ROOT / "configs/pretrain").glob("*.yaml"):
        assert any(config.name in card for card in text.values()), config.name


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_python_snippets_run(card, monkeypatch):
    monkeypatch.chdir(ROOT)
    snippets = blocks(card, "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, str(card), "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_commands_run(card, images, tmp_path, monkeypatch):
    """IMAGES and RUN stand for folders; the command's own `main` is called with its words."""
    monkeypatch.chdir(ROOT)
    snippets = blocks(card, "bash")
    assert snippets
    for number, snippet in enumerate(snippets):
        run = tmp_path / str(number)
        words = {"IMAGES": str(images), "RUN": str(run)}
        python, script, *arguments = shlex.split(snippet.replace("\\\n", " "))
        assert (python, script) == ("python", "tools/pretrain.py")
        spec = importlib.util.spec_from_file_location("pretrain_tool", ROOT / script)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        with pytest.raises(SystemExit) as ended:
            tool.main([words.get(word, word) for word in arguments])
        assert ended.value.code == 0
        assert ckpt.latest_verified(run)[0] is not None
