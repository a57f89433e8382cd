"""docs/DISTRIBUTED.md: its tables are the program's, its commands parse."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from scripts import ROOT, load_tool
from torch.distributed.run import parse_args

from moco.benchmarks import communication
from moco.config import load_pretrain_config

TEXT = (ROOT / "docs/DISTRIBUTED.md").read_text()
COMMANDS = [
    shlex.split(block.replace("\\\n", " "))
    for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
    if block.startswith("torchrun")
]


def between(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", TEXT, re.DOTALL)[1]


def test_the_formula_table_is_the_programs():
    assert between("formula") == communication.formula_table()


def test_the_measured_tables_are_those_of_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/communication.json").read_text())
    ranks = {int(num): found for num, found in result["received_by_rank"].items()}
    sizes = communication.Sizes(**result["bytes"])
    table = communication.measured_table(ranks, result["options"]["batch"], sizes)
    assert between("measured") == table
    assert between("totals") == communication.totals_table(ranks)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[1])
def test_its_commands_parse(words):
    launch = parse_args(words[1:])
    assert (ROOT / launch.training_script).is_file()
    args = load_tool("pretrain").parse_args(launch.training_script_args)
    load_pretrain_config(str(ROOT / args.config_file), args.opts)


def test_all_commands_were_found():
    assert len(COMMANDS) == 2 == TEXT.count("```\ntorchrun")


@pytest.mark.parametrize("path", re.findall(r"`((?:configs|moco|tests|benchmarks)/[\w./]+)`", TEXT))
def test_files_it_names_exist(path):
    assert (ROOT / path).exists()
