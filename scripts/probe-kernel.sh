#!/usr/bin/env bash
# Brings what the probe's eBPF programs are compiled with: bcc, and headers of the kernel that runs. As root, for tests
# and development; run again, it changes nothing.
#
# Where a kernel was built without headers of its own, as in many virtual machines, it borrows Debian's: the programs
# read no kernel structure whose place is not known from the kernel itself (BTF) or checked when they are loaded.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/machine.sh
source "$here/scripts/machine.sh"

release="$(uname -r)"
readonly modules="/lib/modules/$release"

usage() {
    cat <<HELP
Usage: scripts/probe-kernel.sh

Installs bcc for Python and kernel headers, with which the eBPF programs of edged's probe are compiled. Needs root.
HELP
}

# The kernel's own headers, where the system has a package of them; else those of its usual kernel.
headers_package() {
    local own="linux-headers-$release"
    if apt-cache show "$own" &>/dev/null; then printf '%s\n' "$own" && return; fi
    printf 'linux-headers-%s\n' "$(dpkg --print-architecture)"
}

has_headers() {
    [[ -d "$modules/build/include" ]]
}

# Prints the newest tree of headers that is not a common part: linux-headers-6.1.0-40-amd64.
borrowed_headers() {
    find /usr/src -maxdepth 1 -name "linux-headers-*-$(dpkg --print-architecture)" | sort -V | tail -n 1
}

check_machine() {
    [[ -f /usr/lib/python3/dist-packages/bcc/__init__.py ]] || lacks "bcc for Python" python3-bpfcc
    has_headers || [[ -n "$(borrowed_headers)" ]] || lacks "kernel headers" "$(headers_package)"
}

# Only where the kernel has no directory of its own: a package's is left alone.
borrow_headers() {
    local tree common
    tree="$(borrowed_headers)"
    common="${tree%-*}-common"
    mkdir -p "$modules"
    ln -sfn "$tree" "$modules/build"
    ln -sfn "$([[ -d "$common" ]] && printf '%s' "$common" || printf '%s' "$tree")" "$modules/source"
    say "this kernel ($release) borrows the headers in $tree"
}

main() {
    if (($#)); then usage && exit $(($# != 1 || 0)); fi
    [[ "$(id -u)" == 0 ]] || { complain "bcc and headers are installed by root" "Run it as root." && exit 1; }
    ensure_machine check_machine || exit 1
    has_headers || borrow_headers
    has_headers || { complain "there are no headers in $modules/build" && exit 1; }
    say "bcc and headers are there"
}

main "$@"
