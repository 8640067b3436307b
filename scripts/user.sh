# shellcheck shell=bash
# edged for the user who runs install-edge.sh, without root: everything lies in one directory. Sourced, never run.

: "${here:?} ${demo:?}" # install-edge.sh sets them

readonly default_prefix="$HOME/.local/share/edged"
readonly venv_megabytes=700   # the environment and the models
readonly build_megabytes=1500 # llama.cpp's source, its objects and the tools that build it

# --- what is there already ------------------------------------------------------------------------------

# What an up-to-date installation was made from: the package's files and this processor's build of llama.cpp.
wanted_stamp() {
    local sources
    sources="$(cd "$here" && find edged models pyproject.toml README.md LICENSE -type f -not -name '*.pyc' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-16)"
    printf 'sources %s, llama.cpp %s\n' "$sources" "$(wheel_key)"
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

# With --demo it is said before: the demo takes this script's place, so that Ctrl-C reaches the demo alone.
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
    if [[ "$demo" == yes ]]; then
        printf '\nedged is installed. After the demo, which follows, start it:\n\n'
    else
        printf '\nedged is installed. See it at work, then start it:\n\n'
        printf '  %s%q demo%s\n' "$environment" "$command" "$for_demo"
    fi
    printf '  %s%s%q serve\n' "$environment" "$for_serve" "$command"
    [[ -n "$broker" ]] || printf '\nIt looks for an MQTT broker, such as mosquitto, at mqtt://127.0.0.1:1883.\n'
}

# Makes `edged` a command in ~/.local/bin, unless somebody else's file is there. Fails where this shell does not find it:
# many systems have that directory on PATH only from the login on at which it exists.
link_command() {
    local directory="$HOME/.local/bin" target="$venv/bin/edged"
    if [[ -e "$directory/edged" || -L "$directory/edged" ]]; then
        [[ "$(readlink "$directory/edged")" == "$target" ]] || return
    else
        mkdir -p "$directory" && ln -s "$target" "$directory/edged" || return
    fi
    [[ ":$PATH:" == *":$directory:"* ]]
}

what_is_left() {
    printf 'The API key, models and data in %s were left as they were, and so was the cache.\n' "$prefix"
}

# --- all of it ----------------------------------------------------------------------------------------------

install_for_user() {
    prefix="$(realpath -m -- "${prefix:-${EDGED_HOME:-$default_prefix}}")"
    venv="$prefix/venv"
    state="$prefix/install" # this script's own: lock, stamp and logs
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
    say_how_to_start
    [[ "$demo" == no ]] || show_demo
}
