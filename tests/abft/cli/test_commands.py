"""The registry of commands: usage text, dispatch, and answers that need no heavy import."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

import abft.cli.main
from abft.cli.command import Command
from abft.cli.commands import COMMANDS
from abft.cli.main import main, usage

NAMES = ["doctor", "train", "eval", "experiment", "reproduce", "analyze", "report", "compare", "heads",
         "prototype", "plan", "merge", "demo"]  # fmt: skip


def test_usage_names_every_command_once():
    assert [command.name for command in COMMANDS] == NAMES
    for command in COMMANDS:
        assert f"\n  {command.name:<12}{command.help}\n" in usage()
    assert max(map(len, usage().splitlines())) <= 120


def test_a_new_command_is_one_line(monkeypatch, capsys):
    @dataclass
    class Options:
        """Greet somebody."""

        loud: bool = False

    def run(options, further):
        print(f"hello {further.name}" + "!" * options.loud)
        return 0

    row = Command("greet", "say hello", run, lambda: (Options,), {"name": {"help": "whom"}})
    monkeypatch.setattr(abft.cli.main, "COMMANDS", (*COMMANDS, row))
    assert "\n  greet       say hello\n" in usage()
    assert main(["greet", "Ada", "--loud"]) == 0
    assert capsys.readouterr().out == "hello Ada!\n"


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["--help"], 0), ([], 2), (["trian"], 2)])
def test_answers_at_once(arguments, status):
    """Nothing that takes seconds to import is imported."""
    code = f"""
import sys
from abft.cli.main import main
status = main({arguments!r})
heavy = {{"torch", "transformers", "matplotlib", "numpy", "peft"}} & sys.modules.keys()
assert not heavy, heavy
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr


def test_doctor_parses_without_transformers():
    code = """
import sys
sys.modules["transformers"] = None
from abft.cli.commands.doctor import COMMAND
COMMAND.parse([])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_switches_do_not_take_the_next_argument():
    (command,) = (command for command in COMMANDS if command.name == "report")
    options, further = command.parse(["--no_paper", "one", "two", "--output", "r.html"])
    assert (further.experiments, further.no_paper, options.output) == (["one", "two"], True, "r.html")
