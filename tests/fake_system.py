"""A system below a directory, for scripts/service.sh: no systemd, and everything is already anybody's."""

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


class System:
    """``root`` is where its file system begins."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "etc/edged/edged.toml"
        self.config.parent.mkdir(parents=True)

    def attempt(self, script: str) -> "subprocess.CompletedProcess[str]":
        """Run it with the functions of scripts/service.sh."""
        begin = (
            f"root='{self.root}'; source ./install-edge.sh; source scripts/service.sh; settle_places;"
            " chown() { :; }; systemctl() { :; }\n"
        )
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["bash", "-c", begin + script]
        return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)

    def run(self, script: str) -> str:
        done = self.attempt(script)
        assert done.returncode == 0, done.stderr
        return done.stdout
