# shellcheck shell=bash
# What install-edge.sh and run-tests.sh ask of a machine, and how both speak. Sourced, never run.
#
# The sourcing script sets `here` (the checkout) and runs under `set -euo pipefail`.

python_range="3.11, 3.12 or 3.13"

current_step=""
step_started=0
missing=()          # what the machine lacks, in words
missing_packages=() # the Debian packages that bring it

# Says how long the last step took and opens the next one.
step() {
    end_step
    current_step="$1"
    step_started=$SECONDS
    printf '== %s\n' "$current_step"
}

end_step() {
    [[ -z "$current_step" ]] || printf '   took %d s\n' "$((SECONDS - step_started))"
    current_step=""
}

say() {
    printf '   %s\n' "$@"
}

# The first lines say what failed; what follows `--` says what to do.
complain() {
    printf '\n%s: %s\n' "${0##*/}" "$1" >&2
    shift
    (($# == 0)) || printf '   %s\n' "$@" >&2
}

show_end_of_log() {
    [[ -s "$1" ]] || return 0
    printf '   The last lines of %s:\n' "$1" >&2
    tail -n 20 "$1" | sed 's/^/   | /' >&2
}

# --- Python -----------------------------------------------------------------------------------------

python_in_range() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

python_makes_venvs() {
    "$1" -c 'import ensurepip, ssl, sqlite3, venv' 2>/dev/null
}

# Prints the first Python of the right version; with an argument, the first that passes that check too.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if python_in_range "$candidate" && "${1:-python_in_range}" "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# The packages that bring a Python with venv: those of the Python that is there, else the system's own.
python_packages() {
    local found
    if found="$(find_python)"; then
        case "$found" in
            */python3) printf 'python3-venv\n' ;;
            *) printf '%s-venv\n' "${found##*/}" ;;
        esac
    elif [[ -x /usr/bin/python3 ]] && ! python_in_range /usr/bin/python3; then
        printf 'python3.11\npython3.11-venv\n' # the system's own is of another version
    else
        printf 'python3\npython3-venv\n'
    fi
}

# venv_works DIRECTORY: it holds a whole environment, of a Python of the right version that is still there.
venv_works() {
    python_in_range "$1/bin/python" && "$1/bin/python" -m pip --version &>/dev/null
}

need_python() {
    local packages
    find_python python_makes_venvs >/dev/null && return
    mapfile -t packages < <(python_packages)
    lacks "Python $python_range with its venv module" "${packages[@]}"
}

# --- compiler and tools -------------------------------------------------------------------------------

# cmake and ninja are not asked for: the build brings its own where the machine has none.
need_compiler() {
    compiles c "${CC:-cc gcc clang}" && compiles c++ "${CXX:-c++ g++ clang++}" && return
    lacks "a C++ compiler (llama.cpp is compiled for this machine's processor)" g++
}

compiles() {
    local language="$1" compiler
    local header=stdlib.h
    [[ "$language" == c ]] || header=vector
    for compiler in $2; do
        printf '#include <%s>\n' "$header" | "$compiler" -x "$language" -fsyntax-only - 2>/dev/null && return
    done
    return 1
}

# need_tool COMMAND PACKAGE: the command is on PATH or in the system's sbin.
need_tool() {
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null && return
    lacks "$1" "$2"
}

# need_space DIRECTORY MEGABYTES PURPOSE: the disk that will hold the directory has that much free.
need_space() {
    local free
    free=$(($(df -Pk "$(nearest "$1")" | awk 'NR == 2 { print $4 }') / 1024))
    ((free >= $2)) || lacks "$2 MB free for $3 in $1 (there are $free MB)"
}

# The directory, or the one nearest to where it will be.
nearest() {
    local existing="$1"
    until [[ -d "$existing" ]]; do existing="$(dirname "$existing")"; done
    printf '%s\n' "$existing"
}

on_one_disk() {
    [[ "$(stat -c %d "$(nearest "$1")")" == "$(stat -c %d "$(nearest "$2")")" ]]
}

# make_own_directory PARENT NAME: prints a new hidden directory there; those of runs that are no more are removed.
make_own_directory() {
    local left
    mkdir -p "$1"
    for left in "$1/.$2".*; do
        if ! [[ "$left" =~ \.([0-9]+)\.[^./]+$ ]] || ! kill -0 "${BASH_REMATCH[1]}" 2>/dev/null; then rm -rf "$left"; fi
    done
    mktemp -d "$1/.$2.$$.XXXXXX"
}

# --- what is missing ------------------------------------------------------------------------------------

lacks() {
    missing+=("$1")
    shift
    missing_packages+=("$@")
}

# ensure_machine CHECK: runs CHECK, which calls need_*; as root installs what it found missing, else says it all.
ensure_machine() {
    "$1"
    ((${#missing[@]})) || return 0
    if can_install_packages; then
        say "installing with apt-get: ${missing_packages[*]}"
        install_packages "${missing_packages[@]}"
        missing=() missing_packages=()
        "$1"
        ((${#missing[@]})) || return 0
    fi
    report_missing
    return 1
}

lacks_nothing() {
    ((${#missing[@]} == 0))
}

# For a dry run: what ensure_machine would do about it.
say_what_is_missing() {
    lacks_nothing && return
    say "${missing[@]/#/misses }"
    ((${#missing_packages[@]} == 0)) || say "would install with apt-get: ${missing_packages[*]}"
}

can_install_packages() {
    ((${#missing_packages[@]})) && [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null
}

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && finish_packages apt_get && apt_get install "$@"; } </dev/null
}

# Nobody is asked anything: what is installed is not removed, and a configuration file that was changed stays.
apt_get() {
    apt-get -q -y --no-install-recommends --no-remove \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@"
}

# finish_packages APT…: what a power cut left half installed, from which apt does not go on by itself. Where this fails,
# the installation that follows says why.
finish_packages() {
    dpkg --force-confdef --force-confold --configure -a || true
    "$@" --fix-broken install || true
}

report_missing() {
    complain "this machine lacks:"
    printf '   - %s\n' "${missing[@]}" >&2
    ((${#missing_packages[@]})) || return 0
    printf '   On Debian or Ubuntu, root brings it with:\n' >&2
    printf '     %sapt-get update && %sapt-get install -y %s\n' "$(sudo_word)" "$(sudo_word)" "${missing_packages[*]}" >&2
    printf '   Then run %s again.\n' "${0##*/}" >&2
}

# A fresh Debian has no sudo.
sudo_word() {
    [[ "$(id -u)" == 0 ]] || ! command -v sudo >/dev/null || printf 'sudo '
}
