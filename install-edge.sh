#!/usr/bin/env bash
# Installs edged for the user who runs it: its own Python environment, llama.cpp compiled for this processor, an API
# key and both default models. Needs no root. Running it again repairs or updates, and takes seconds when all is there.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/machine.sh
source "$here/scripts/machine.sh"
# shellcheck source=scripts/llama-wheel.sh
source "$here/scripts/llama-wheel.sh"

readonly default_prefix="$HOME/.local/share/edged"
readonly venv_megabytes=700   # the environment and the models
readonly build_megabytes=1500 # llama.cpp's source, its objects and the tools that build it

prefix="${EDGED_HOME:-$default_prefix}"
demo=no
broker=""
explained=no # whether the reason for a failure was told already

usage() {
    cat <<HELP
Usage: ./install-edge.sh [--demo] [--prefix DIR] [--broker URL]

Installs edged for the user who runs it; no root is needed.

  --demo         afterwards show it at work: a sensor asks, edged answers from its manuals
  --prefix DIR   where everything goes (default: \$EDGED_HOME, else ~/.local/share/edged)
  --broker URL   the MQTT broker to use, mqtt://HOST:PORT or mqtts://HOST:PORT
                 (default: the demo brings its own; the daemon looks at 127.0.0.1:1883)
  --help         this text

The first run compiles llama.cpp for this processor: minutes on a fast machine, up to an hour on a small board.
The result and the models are kept in \$EDGED_CACHE (default: ~/.cache/edged), and later runs take them from there.
HELP
}

# --- options ------------------------------------------------------------------------------------------

parse_options() {
    while (($#)); do
        case "$1" in
            --demo) demo=yes ;;
            --help | -h) usage && exit 0 ;;
            --prefix=* | --broker=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
            --prefix)
                prefix="$(value_of "$@")"
                shift
                ;;
            --broker)
                broker="$(value_of "$@")"
                shift
                ;;
            *) wrong_use "there is no option '$1'" ;;
        esac
        shift
    done
    prefix="$(realpath -m -- "$prefix")"
    [[ -z "$broker" || "$broker" =~ ^mqtts?://. ]] || wrong_use "'$broker' is no broker's URL such as mqtt://host:1883"
}

value_of() {
    [[ -n "${2:-}" ]] || wrong_use "$1 needs a value"
    printf '%s\n' "$2"
}

wrong_use() {
    complain "$1" "./install-edge.sh --help lists the options."
    exit 2
}

# --- what is there already ------------------------------------------------------------------------------

# What an up-to-date installation was made from: the package's files and this processor's build of llama.cpp.
wanted_stamp() {
    local sources
    sources="$(cd "$here" && find edged models pyproject.toml README.md LICENSE -type f -not -name '*.pyc' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-16)"
    printf 'sources %s, llama.cpp %s\n' "$sources" "$(llama_key)"
}

is_current() {
    [[ -x "$venv/bin/edged" && -f "$state/stamp" && "$(<"$state/stamp")" == "$(wanted_stamp)" ]] && venv_works "$venv"
}

# --- steps ------------------------------------------------------------------------------------------------

check_machine() {
    is_current && return
    need_space "$prefix" "$venv_megabytes" "edged and its models"
    venv_works "$venv" || need_python
    cached_wheel >/dev/null && return
    need_compiler
    need_space "$(wheel_directory)" "$build_megabytes" "compiling llama.cpp"
}

# Everything that can be refused is refused here, before anything is changed.
check_all() {
    [[ "$(uname -s)" == Linux && "$(getconf LONG_BIT)" == 64 ]] ||
        give_up "edged needs a 64-bit Linux" "Nothing was changed."
    [[ -d "$state" || ! -e "$venv" ]] ||
        give_up "$venv is there and was not made by this script" "Nothing was changed. Choose another --prefix."
    ensure_machine check_machine || give_up "" "$prefix was not touched."
    say "$(uname -m), $(nproc) cores; edged goes to $prefix"
}

prepare_prefix() {
    (umask 077 && mkdir -p "$state") || give_up "cannot write to $prefix" "Choose another --prefix."
    exec 9>"$state/lock"
    flock -n 9 || give_up "another install-edge.sh is at work in $prefix" "Wait for it to end, then run this again."
}

make_venv() {
    if venv_works "$venv"; then
        say "kept"
        return
    fi
    run_logged venv "make the Python environment" "$(find_python python_makes_venvs)" -m venv --clear "$venv"
}

make_wheel() {
    local log="$state/llama-build.log"
    if ! cached_wheel >/dev/null; then
        build_wheel "$venv/bin/python" "$log" || failed_logged "$log" "compile llama.cpp"
    fi
    say "$(cached_wheel)"
}

install_edged() {
    rm -f "$state/stamp"
    say "edged and the packages it needs"
    # By itself and by force: a build for another processor has the same version.
    run_logged pip-llama "install llama-cpp-python" \
        "$venv/bin/python" -m pip install --force-reinstall --no-deps "$(cached_wheel)"
    run_logged pip-edged "install edged" "$venv/bin/python" -m pip install "${here}[convert,broker]"
    run_logged import "load llama.cpp" "$venv/bin/python" -c 'import edged, llama_cpp'
    wanted_stamp >"$state/stamp"
}

make_api_key() {
    if [[ -s "$prefix/api-key" ]]; then
        say "kept: $prefix/api-key"
        return
    fi
    (umask 077 && "$venv/bin/python" -c 'import secrets; print(secrets.token_hex(32))' >"$prefix/api-key.new")
    mv "$prefix/api-key.new" "$prefix/api-key"
    say "made: $prefix/api-key, readable only for you"
}

pull_models() {
    EDGED_HOME="$prefix" "$venv/bin/edged" models pull ||
        give_up "could not bring the models" "edged itself is installed. Once the cause is mended, run this again."
}

# --- at the end ---------------------------------------------------------------------------------------------

show_demo() {
    local options=()
    [[ -z "$broker" ]] || options=(--broker "$broker")
    EDGED_HOME="$prefix" exec "$venv/bin/edged" demo "${options[@]}" 9>&-
}

say_how_to_start() {
    local environment="" command="$venv/bin/edged" for_demo="" for_serve=""
    if [[ "$prefix" != "$default_prefix" ]]; then
        environment="EDGED_HOME=$(printf '%q' "$prefix") "
    elif link_command; then
        command=edged
    fi
    if [[ -n "$broker" ]]; then
        for_demo=" --broker $(printf '%q' "$broker")"
        for_serve="EDGED_MQTT__URL=$(printf '%q' "$broker") "
    fi
    printf '\nedged is installed. See it at work, then start it:\n\n'
    printf '  %s%q demo%s\n' "$environment" "$command" "$for_demo"
    printf '  %s%s%q serve\n' "$environment" "$for_serve" "$command"
}

# Makes `edged` a command where ~/.local/bin is on PATH; somebody else's file of that name is left alone.
link_command() {
    local directory="$HOME/.local/bin" target="$venv/bin/edged"
    [[ ":$PATH:" == *":$directory:"* ]] || return
    if [[ -e "$directory/edged" || -L "$directory/edged" ]]; then
        [[ "$(readlink "$directory/edged")" == "$target" ]]
        return
    fi
    mkdir -p "$directory" && ln -s "$target" "$directory/edged"
}

# --- when it fails ------------------------------------------------------------------------------------------

# run_logged NAME PURPOSE COMMAND...: its output goes to a log, which is shown if it fails.
run_logged() {
    local log="$state/$1.log" purpose="$2"
    shift 2
    "$@" >"$log" 2>&1 || failed_logged "$log" "$purpose"
}

failed_logged() {
    complain "could not $2"
    show_end_of_log "$1"
    give_up "" "The API key, models and data in $prefix were left as they were, and so was the cache." \
        "Mend the cause named above (often: no network, or a full disk) and run this again: it goes on from here."
}

# give_up WHAT ADVICE...: the one way out after a failure; an empty WHAT was told before.
give_up() {
    explained=yes
    if [[ -n "${1:-}" ]]; then
        complain "$@"
    elif (($# > 1)); then
        printf '   %s\n' "${@:2}" >&2
    fi
    exit 1
}

on_exit() {
    local status=$?
    remove_build
    if ((status != 0 && status != 2)) && [[ "$explained" == no ]]; then
        complain "failed at '${current_step:-the start}' (status $status)" "Run this again: it goes on from here."
    fi
}

on_interrupt() {
    explained=yes
    complain "stopped at '${current_step:-the start}'" "Nothing half-made is in use. Run this again: it goes on from here."
    exit 130
}

main() {
    parse_options "$@"
    venv="$prefix/venv"
    state="$prefix/install" # this script's own: lock, stamp and logs
    trap on_exit EXIT
    trap on_interrupt INT TERM HUP

    step "Check this machine"
    check_all
    prepare_prefix
    if is_current; then
        say "edged is installed and up to date"
    else
        step "Python environment"
        make_venv
        step "llama.cpp for this processor"
        make_wheel
        step "Install edged"
        install_edged
    fi
    step "API key"
    make_api_key
    step "Models"
    pull_models
    end_step
    if [[ "$demo" == yes ]]; then show_demo; fi
    say_how_to_start
}

main "$@"
