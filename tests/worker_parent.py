"""A daemon in the small, to be killed.

``worker_parent.py SOCKET MODEL COMMAND...`` prints ``pid N`` of its busy worker again and again.
"""

import asyncio
import sys
from pathlib import Path

from edged.types import Segment
from edged.workers.protocol import WorkerSettings
from edged.workers.state import WorkerState
from edged.workers.worker import Worker


def _ignore(_state: WorkerState, _why: str) -> None:
    return


async def main() -> None:
    """Serve with one worker and keep it busy until somebody ends this process."""
    settings = WorkerSettings(kind="chat", model=sys.argv[2], threads=1)
    worker = Worker(settings, Path(sys.argv[1]), on_state=_ignore, command=sys.argv[3:])
    worker.start()
    async for _ in worker.generate([Segment("pause=0.01 tokens=100000 Count:")], max_tokens=8000):
        sys.stdout.write(f"pid {worker.pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
