"""The run scripts: set-up with a stand-in for Python and pip, and the command that each script gives."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cpt_rft.cli import build_parser
from tests.helpers.tree import ROOT

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    *"import ensurepip"*) exit "${ENSUREPIP_EXIT:-0}" ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip install"*) exit "${PIP_EXIT:-0}" ;;
esac
"""
FAKE_COMMAND = """#!/bin/sh
echo "cpt-rft $*" >> "$CALLS"
[ "$1" != plan ] || printf 'first\\nsecond\\n'
"""


class Machine:
    """A copy of the scripts beside a project file, and a Python that writes down what it is asked to do."""

    def __init__(self, folder: Path, gpu: bool = False) -> None:
        self.project = folder / "a project"
        self.calls_file = folder / "calls"
        shutil.copytree(ROOT / "scripts", self.project / "scripts", ignore=shutil.ignore_patterns("engine_envs"))
        shutil.copy(ROOT / "pyproject.toml", self.project)
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        self.python = bin_folder / "python"
        self.write_program(self.python, FAKE_PYTHON)
        self.write_program(bin_folder / "nvidia-smi", f"#!/bin/sh\nexit {int(not gpu)}\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CPT_RFT_")}
        self.environment = kept | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "CPT_RFT_PYTHON": str(self.python),
            "CALLS": str(self.calls_file),
        }

    @staticmethod
    def write_program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(
        self, script: str, *arguments: str, cwd: str | Path = "/", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """By default from the root folder, so that nothing depends on where a script is called."""
        command = ["bash", str(self.project / "scripts" / script), *arguments]
        return subprocess.run(
            command, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        self.write_program(self.project / ".venv/bin/cpt-rft", FAKE_COMMAND)
        return self.run("report.sh", "study", **environment)

    def calls(self, containing: str = "") -> list[str]:
        """What was called since the last look."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [line for line in lines if containing in line]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash_and_can_be_executed(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name == "lib.sh" or os.access(script, os.X_OK)
    assert script.name == "lib.sh" or script.read_text().startswith("#!/usr/bin/env bash\n")


def test_the_first_start_installs_a_cpu_torch_and_then_the_project(machine):
    result = machine.set_up()
    assert result.returncode == 0, result.stderr
    installs = machine.calls("pip install")
    assert [call.split()[-1] for call in installs] == ["torch==2.13.0", "project[local]"]
    assert "200 MB" in result.stderr and "CPT_RFT_TORCH_INDEX" in result.stderr


def test_the_second_start_installs_nothing(machine):
    machine.set_up()
    machine.calls()
    assert machine.set_up().returncode == 0
    assert machine.calls("pip") == []


def test_a_changed_project_file_installs_again_into_the_same_environment(machine):
    machine.set_up()
    machine.calls()
    with (machine.project / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    machine.set_up()
    calls = machine.calls()
    assert any("pip install" in call for call in calls)
    assert not any("-m venv" in call for call in calls)


def test_a_moved_project_makes_its_environment_anew(machine, tmp_path):
    machine.set_up()
    machine.calls()
    machine.project = machine.project.rename(tmp_path / "moved")
    machine.set_up()
    assert machine.calls("-m venv")


def test_with_a_gpu_torch_is_left_to_the_project_file(tmp_path):
    machine = Machine(tmp_path, gpu=True)
    machine.set_up()
    assert not any("torch==" in call for call in machine.calls("pip install"))


def test_the_wheel_index_of_the_environment_variable_is_used_for_torch_only(machine):
    machine.set_up(CPT_RFT_TORCH_INDEX="https://wheels.example/cpu")
    torch, project = machine.calls("pip install")
    assert "--index-url https://wheels.example/cpu torch==2.13.0" in torch
    assert "--index-url" not in project


def test_a_failed_install_is_told_and_tried_again(machine):
    result = machine.set_up(PIP_EXIT="1")
    assert result.returncode == 2
    assert "pip could not install" in result.stderr and "Fix:" in result.stderr
    assert machine.calls("cpt-rft") == []
    assert machine.set_up().returncode == 0
    assert machine.calls("pip install")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CPT_RFT_PYTHON": "false"}, "No Python 3.11, 3.12 or 3.13 was found."),
        ({"CPT_RFT_PYTHON": "no-such-python"}, "apt install python3 python3-venv"),
        ({"ENSUREPIP_EXIT": "1"}, "cannot make virtual environments"),
    ],
)
def test_without_a_fit_python_one_line_says_what_to_install(machine, environment, message):
    result = machine.run("demo.sh", **environment)
    assert result.returncode == 2
    assert message in result.stderr and "Fix:" in result.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "commands"),
    [
        ("demo.sh", ["seeds=[0,1]"], ["run configs/experiments/miniature.yaml seeds=[0,1]"]),
        ("train_task.sh", ["study", "grpo", "first", "--seed", "1"], ["train study grpo first --seed 1"]),
        ("evaluate.sh", ["study", "grpo", "first"], ["evaluate study grpo first"]),
        ("evaluate.sh", ["study"], ["evaluate study"]),
        ("prepare_data.sh", ["gqa", "--offline"], ["data prepare gqa --offline"]),
        ("report.sh", ["configs/experiments/study.yaml"], ["report configs/experiments/study.yaml"]),
        (
            "run_sequence.sh",
            ["study", "sft", "--seed", "2"],
            [
                "plan study --method sft --stages --seed 2",
                "evaluate study --seed 2",
                "train study sft first --seed 2",
                "evaluate study sft first --seed 2",
                "train study sft second --seed 2",
                "evaluate study sft second --seed 2",
            ],
        ),
    ],
)
def test_each_script_gives_its_command(machine, script, arguments, commands):
    machine.set_up()
    machine.calls()
    result = machine.run(script, *arguments)
    assert result.returncode == 0, result.stderr
    assert machine.calls("cpt-rft ") == [f"cpt-rft {command}" for command in commands]
    for command in commands:
        _, overrides = build_parser(command.split()[0]).parse_known_args(command.split())
        assert all("=" in override for override in overrides)


@pytest.mark.parametrize(
    "script", ["train_task.sh", "evaluate.sh", "run_sequence.sh", "report.sh", "prepare_data.sh", "campaign.sh"]
)
def test_without_arguments_a_script_prints_its_usage(machine, script):
    result = machine.run(script)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: scripts/")


def test_an_experiment_may_be_a_path_from_the_callers_folder(machine, tmp_path):
    machine.set_up()
    machine.calls()
    (tmp_path / "own.yaml").touch()
    machine.run("report.sh", "own.yaml", cwd=tmp_path)
    assert machine.calls("cpt-rft ") == [f"cpt-rft report {tmp_path}/own.yaml"]


def test_a_failing_command_ends_a_sequence_with_its_exit_code(machine):
    machine.set_up()
    machine.write_program(machine.project / ".venv/bin/cpt-rft", FAKE_COMMAND + '[ "$1" != train ] || exit 7\n')
    machine.calls()
    assert machine.run("run_sequence.sh", "study", "sft").returncode == 7
    assert len(machine.calls("cpt-rft train")) == 1
