"""install-edge.sh and the shell parts it shares with run-tests.sh, run as a user runs them."""

import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
INSTALLER = CHECKOUT / "install-edge.sh"
SHELL_SCRIPTS = [
    INSTALLER,
    CHECKOUT / "run-tests.sh",
    CHECKOUT / ".ci/run",
    *sorted((CHECKOUT / "scripts").glob("*.sh")),
]
TOOLS_OF_EVERY_SYSTEM = (
    *("awk", "bash", "cat", "cut", "df", "dirname", "env", "find", "flock", "getconf", "grep", "id", "ln", "mkdir"),
    *(
        "mktemp",
        "mv",
        "nproc",
        "readlink",
        "realpath",
        "rm",
        "sed",
        "sha256sum",
        "sort",
        "tail",
        "tee",
        "uname",
        "xargs",
    ),
)
"""All the installer calls before it has a Python and a compiler."""
FAKE_PIP = """#!/bin/sh
# python -m pip download … --dest DIRECTORY … | python -m pip wheel … --wheel-dir DIRECTORY …
doing="$3"
while [ $# -gt 0 ]; do
    case "$1" in --dest | --wheel-dir) directory="$2" ;; esac
    shift
done
if [ "$doing" = download ]; then
    touch "$directory/llama_cpp_python-1.tar.gz"
else
    for number in $(seq 40); do echo "  [$number/40] c++ -o object-$number"; done
    touch "$directory/llama_cpp_python-1-py3-none-any.whl"
    exit "${FAKE_EXIT:-0}"
fi
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without edged's own variables, with ``changes``; the cache is the default one."""
    kept = {name: value for name, value in os.environ.items() if name == "EDGED_CACHE" or not name.startswith("EDGED_")}
    return kept | changes


def install(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(INSTALLER), *map(str, arguments)]
    return subprocess.run(
        command, env=env or environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def run_shell(script: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``script`` with the functions that the installer and run-tests.sh share."""
    sources = f"set -euo pipefail; here='{CHECKOUT}'; source scripts/machine.sh; source scripts/llama-wheel.sh\n"
    return subprocess.run(
        ["bash", "-c", sources + script],
        cwd=CHECKOUT,
        env=env or environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with the tools of every system: no Python, no compiler, no cmake, no apt-get."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in TOOLS_OF_EVERY_SYSTEM:
        found = shutil.which(tool)
        assert found is not None, tool
        (directory / tool).symlink_to(found)
    return str(directory)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole installation, made by the installer from the cached wheel."""
    if run_shell("cached_wheel").returncode != 0:
        pytest.skip("the cache holds no llama-cpp-python wheel for this processor, and compiling takes minutes")
    prefix = tmp_path_factory.mktemp("installed") / "edged"
    result = install("--prefix", prefix)
    assert result.returncode == 0, result.stdout + result.stderr
    return prefix


def test_help_names_every_option() -> None:
    """--help tells each option and exits with 0."""
    result = install("--help")
    assert result.returncode == 0
    for option in ("--demo", "--prefix DIR", "--broker URL", "--help"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--fast"], "no option '--fast'"), (["--prefix"], "--prefix needs a value"), (["--broker=x"], "no broker's URL")],
)
def test_wrong_use_is_refused(arguments: list[str], complaint: str) -> None:
    """A wrong option is named and exits with 2."""
    result = install(*arguments)
    assert result.returncode == 2
    assert complaint in result.stderr


def test_everything_missing_is_named_at_once(bare_path: str, tmp_path: Path) -> None:
    """Without Python and compiler both are named with one apt command, and nothing is changed."""
    prefix, cache = tmp_path / "edged", tmp_path / "cache"
    result = install("--prefix", prefix, env=environment(PATH=bare_path, EDGED_CACHE=str(cache)))
    assert result.returncode == 1
    assert "Python 3.11, 3.12 or 3.13" in result.stderr
    assert "C++ compiler" in result.stderr
    assert re.search(r"apt-get update && .*apt-get install -y python3\S* python3\S*-venv g\+\+\n", result.stderr)
    assert not prefix.exists()
    assert not cache.exists()


def test_somebody_elses_venv_is_left_alone(tmp_path: Path) -> None:
    """A directory named venv that this script did not make is not overwritten."""
    mine = tmp_path / "venv" / "mine"
    mine.parent.mkdir()
    mine.write_text("kept")
    result = install("--prefix", tmp_path)
    assert result.returncode == 1
    assert "was not made by this script" in result.stderr
    assert list(tmp_path.rglob("*")) == [mine.parent, mine]


@pytest.mark.timeout(300)
def test_a_failure_shows_its_log_and_what_to_do(tmp_path: Path) -> None:
    """Where a package cannot be had, the reason, the log's end and the way on are told; a next run starts over."""
    if run_shell("cached_wheel").returncode != 0:
        pytest.skip("the cache holds no llama-cpp-python wheel for this processor")
    offline = environment(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS=str(tmp_path))
    result = install("--prefix", tmp_path / "edged", env=offline)
    assert result.returncode == 1
    assert "could not install edged" in result.stderr
    assert "No matching distribution found" in result.stderr
    assert "run this again" in result.stderr
    assert not (tmp_path / "edged/install/stamp").exists()


@pytest.mark.models
@pytest.mark.timeout(600)
def test_an_installed_edged_runs(prefix: Path) -> None:
    """After the installation, edged tells its version and finds its configuration in order."""
    edged = prefix / "venv/bin/edged"
    for arguments in (["version"], ["check"]):
        result = subprocess.run(
            [edged, *arguments],
            env=environment(EDGED_HOME=str(prefix)),
            cwd=prefix,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.models
@pytest.mark.timeout(600)
def test_the_api_key_is_for_its_owner_only(prefix: Path) -> None:
    """The key has 32 random bytes in hex and can be read by nobody else."""
    key = prefix / "api-key"
    assert re.fullmatch(r"[0-9a-f]{64}\n", key.read_text())
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.models
@pytest.mark.timeout(600)
def test_a_second_run_changes_nothing_and_needs_no_network(prefix: Path) -> None:
    """With everything there, a second run keeps environment and key, offline."""
    kept = [prefix / "api-key", prefix / "install/stamp", prefix / "install/pip-edged.log", prefix / "venv/pyvenv.cfg"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in kept]
    nowhere = "http://127.0.0.1:9"  # discard: nobody answers
    result = install("--prefix", prefix, env=environment(PIP_NO_INDEX="1", HTTP_PROXY=nowhere, HTTPS_PROXY=nowhere))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "up to date" in result.stdout
    assert [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in kept] == before


@pytest.mark.models
@pytest.mark.timeout(600)
def test_two_at_once_in_one_prefix_are_refused(prefix: Path) -> None:
    """While one installer works in a prefix, another says so and ends."""
    with (prefix / "install/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = install("--prefix", prefix)
    assert result.returncode == 1
    assert "another install-edge.sh is at work" in result.stderr


def fake_build(tmp_path: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel with a pip that only pretends to."""
    python = tmp_path / "python"
    python.write_text(FAKE_PIP)
    python.chmod(0o755)
    script = f"build_wheel '{python}' '{tmp_path}/log' && cached_wheel"
    return run_shell(script, environment(EDGED_CACHE=str(tmp_path / "cache"), **changes))


def test_a_built_wheel_lands_in_the_cache(tmp_path: Path) -> None:
    """A build shows its progress in tenths and leaves the wheel, and nothing else, under this processor's key."""
    result = fake_build(tmp_path)
    assert result.returncode == 0, result.stderr
    shown = re.findall(r"\[(\d+)/40\]", result.stdout)
    assert shown == [str(number) for number in range(4, 41, 4)]
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [str(path) for path in files] == result.stdout.splitlines()[-1:]


def test_a_failed_build_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    """A build that fails late leaves neither a wheel nor its working directory; its log is kept."""
    result = fake_build(tmp_path, FAKE_EXIT="1")
    assert result.returncode != 0
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not list((tmp_path / "cache").rglob(".building*"))
    assert "[40/40]" in (tmp_path / "log").read_text()


def test_the_wheel_is_of_the_version_that_the_project_pins() -> None:
    """The shell reads the version of llama-cpp-python from pyproject.toml."""
    assert (
        f'"llama-cpp-python=={run_shell("llama_version").stdout.strip()}"' in (CHECKOUT / "pyproject.toml").read_text()
    )


def test_shell_scripts_pass_shellcheck() -> None:
    """shellcheck finds nothing in any of the shell scripts."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(
        [shellcheck, "--external-sources", *map(str, SHELL_SCRIPTS)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
