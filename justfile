# Each recipe is plain shell, line by line, which also runs without just. ./run-tests.sh makes the .venv that they use.

# Everything that needs no board.
test *arguments:
    ./run-tests.sh {{arguments}}

# Everything, and the boards for as long as the minutes last.
all minutes="60":
    ./run-tests.sh --board auto --board-until "$(($(date +%s) + {{minutes}} * 60))"

# Tests on an emulated board: amd64 or arm64 (a Cortex-A76). The first run makes its image, as root.
device architecture="amd64" *arguments:
    scripts/board-image.sh {{architecture}}
    .venv/bin/python -m pytest tests/device --board {{architecture}} {{arguments}}

# The same with what takes hours: many power cuts, replayed records of writes.
device-long architecture="amd64" *arguments:
    scripts/board-image.sh {{architecture}}
    .venv/bin/python -m pytest tests/device --long --board {{architecture}} {{arguments}}
