"""What the README says to paste runs, in order, in one namespace; what it says to type exists."""
import re
from pathlib import Path

import pytest

import minicnn as mc
from minicnn import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_python_blocks_run_one_after_the_other(capsys):
    pytest.importorskip("sklearn", reason="the README trains on scikit-learn's digits")
    code = blocks("python")
    assert len(code) >= 3
    namespace = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "(2, 3, 8, 8) (4, 3, 3, 3)" in printed
    loss = float(re.search(r"loss after one epoch (\S+)", printed)[1])
    assert loss < 1.0, "one epoch on the digits brings the loss from 2.3 to well under 1"


def test_the_commands_it_names_exist():
    named = set(re.findall(r"`minicnn (\w+)", README)) | set(re.findall(r"minicnn (\w+)`", README))
    assert named
    for command in named:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0


def test_what_its_table_names_is_there():
    table = README.split("## What is there")[1].split("##")[0]
    for room in (mc.ops, mc.layers, mc.testing):
        prefix = room.__name__.removeprefix("minicnn.")
        for name in re.findall(rf"`{prefix}\.(\w+)", table):
            assert hasattr(room, name), f"{prefix}.{name}"
    layers = re.search(r"\| layers \| (.*?)\|", table)[1]
    for name in re.findall(r"`([A-Z]\w+)`", layers):
        assert hasattr(mc.layers, name), name


def test_it_has_the_two_commands():
    assert sum(line.startswith("python3 -m venv") for block in blocks("sh") for line in block.splitlines()) == 2
