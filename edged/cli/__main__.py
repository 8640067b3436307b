"""``python -m edged.cli``."""

from edged.cli import main

main()
