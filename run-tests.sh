#!/usr/bin/env bash
# Sets up what the tests need in .venv, runs every static check, then pytest with the arguments given here. All of it
# runs even when an early part fails; pytest's summary is the last thing printed, what failed before it just above.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/machine.sh
source "$here/scripts/machine.sh"
# shellcheck source=scripts/llama-wheel.sh
source "$here/scripts/llama-wheel.sh"

readonly venv="$here/.venv"
readonly stamp="$venv/edged-tests-stamp"

failures=()

check_machine() {
    venv_works "$venv" || need_python
    cached_wheel >/dev/null || need_compiler
    need_tool mosquitto mosquitto
    need_tool mosquitto_pub mosquitto-clients
}

# Without a broker most tests still run; without a Python or a compiler none would.
prepare_machine() {
    ensure_machine check_machine && return
    failures+=("the machine's tools")
    if ! venv_works "$venv" && ! find_python python_makes_venvs >/dev/null; then exit 1; fi
}

wanted_stamp() {
    printf 'pyproject %s, llama.cpp %s\n' "$(sha256sum <"$here/pyproject.toml" | cut -c 1-16)" "$(wheel_key)"
}

prepare_venv() {
    venv_works "$venv" || "$(find_python python_makes_venvs)" -m venv --clear "$venv"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$(wanted_stamp)" ]]; then
        say "up to date"
        return
    fi
    rm -f "$stamp"
    cached_wheel >/dev/null || compile_llama
    "$venv/bin/python" -m pip install --quiet --force-reinstall --no-deps "$(cached_wheel)"
    "$venv/bin/python" -m pip install --quiet --editable "${here}[convert,broker,dev]"
    wanted_stamp >"$stamp"
}

compile_llama() {
    local log="$venv/llama-build.log"
    build_wheel "$venv/bin/python" "$log" && return
    complain "could not compile llama.cpp"
    show_end_of_log "$log"
    exit 1
}

# Into the cache, from which the tests take them; the tests that need models fail or skip by themselves without.
prepare_models() {
    EDGED_HOME="$venv/home" edged models pull || failures+=("models")
}

# The tests of the probe say by themselves what is missing for them.
prepare_probe() {
    [[ "$(id -u)" == 0 ]] || { say "its tests of eBPF need root: they will be skipped" && return; }
    scripts/probe-kernel.sh || say "its tests of eBPF will be skipped"
}

check() {
    local name="$1"
    shift
    step "$name"
    "$@" || failures+=("$name")
}

check_shell_scripts() {
    shellcheck --external-sources install-edge.sh run-tests.sh .ci/run scripts/*.sh
}

run_static_checks() {
    check "ruff check" ruff check .
    check "ruff format" ruff format --check .
    check "mypy" mypy
    check "mypy of the benchmarks" mypy benchmarks/*.py
    check "lint-imports" lint-imports
    check "shellcheck" check_shell_scripts
}

tell_failures() {
    if ((${#failures[@]})); then
        complain "failed before pytest: $(printf '%s; ' "${failures[@]}")"
    else
        say "all checks before pytest passed"
    fi
}

main() {
    cd "$here"
    trap remove_build EXIT
    trap 'exit 130' INT TERM HUP
    step "Check this machine"
    prepare_machine
    step "Python environment in .venv"
    prepare_venv
    export PATH="$venv/bin:$PATH:/usr/sbin:/sbin"
    step "Models"
    prepare_models
    step "eBPF for the probe"
    prepare_probe
    run_static_checks
    step "pytest"
    tell_failures
    local status=0
    python -m pytest "$@" </dev/null || status=$?
    ((status != 0 || ${#failures[@]} == 0)) || status=1
    return "$status"
}

main "$@"
