# shellcheck shell=bash
# One wheel of llama-cpp-python per processor, built once and kept. Sourced after machine.sh by install-edge.sh and
# run-tests.sh, which set `here` (the checkout).
#
# There are no published wheels, and a build for any processor would leave out the fast kernels of this one. Only the
# libraries that the wheel installs are compiled, which takes less than half the time of the whole of llama.cpp.

: "${here:?is the checkout, set by the script that sources this}"

readonly build_bytes_per_job=700000000 # what the hungriest source file takes to compile, about

building="" # the directory of a build that is under way

# The version pyproject.toml pins; a test holds the advice that names it (edged/runtime/health.py) to that.
llama_version() {
    sed -n 's/^ *"llama-cpp-python==\([^"]*\)".*/\1/p' "$here/pyproject.toml"
}

# A short hash of what decides the code a native build emits: the instruction sets and, on ARM, the core types.
processor_hash() {
    grep -E '^(flags|Features|CPU implementer|CPU part)' /proc/cpuinfo | sort -u | sha256sum | cut -c 1-12
}

llama_key() {
    printf '%s-%s-%s\n' "$(llama_version)" "$(uname -m)" "$(processor_hash)"
}

# What is built: llama.cpp for a processor, and what of ours goes into it.
wheel_key() {
    printf '%s-%s\n' "$(llama_key)" "$(cat "$here"/scripts/llama/* | sha256sum | cut -c 1-12)"
}

wheel_directory() {
    printf '%s/wheels/%s\n' "${EDGED_CACHE:-$HOME/.cache/edged}" "$(wheel_key)"
}

# Prints the path of the cached wheel for this processor; fails when there is none.
cached_wheel() {
    local wheel
    for wheel in "$(wheel_directory)"/llama_cpp_python-*.whl; do
        [[ -f "$wheel" ]] && printf '%s\n' "$wheel" && return
    done
    return 1
}

# build_wheel PYTHON LOG: puts the wheel into the cache. Nothing is put there unless the build succeeds.
build_wheel() {
    local python="$1" log="$2" directory
    directory="$(wheel_directory)"
    mkdir -p "$directory"
    building="$(make_own_directory "${directory%/*}" building)"
    mkdir "$building/tmp" "$building/sdist" "$building/wheel"
    say "downloading the source of llama-cpp-python $(llama_version)"
    # A shell of its own, so that what a trap says here does not end in the log.
    (download_source "$python" "$building") >"$log" 2>&1 &&
        compile_wheel "$python" "$building" 2>&1 | tee -a "$log" | show_build_progress &&
        sync "$building"/wheel/llama_cpp_python-*.whl &&
        mv "$building"/wheel/llama_cpp_python-*.whl "$directory/"
    local status=$?
    remove_build
    return "$status"
}

download_source() {
    TMPDIR="$2/tmp" "$1" -m pip download --no-deps --no-binary llama-cpp-python --dest "$2/sdist" \
        "llama-cpp-python==$(llama_version)"
}

# No cache: pip's own knows wheels by name and would hand out one built for another processor.
# Temporary files go beside the wheel: /tmp is memory on many systems, and this needs half a gigabyte.
compile_wheel() {
    CMAKE_ARGS="-DLLAVA_BUILD=OFF '-DCMAKE_PROJECT_ggml_INCLUDE=$here/scripts/llama/barrier.cmake' ${CMAKE_ARGS:-}" \
        CMAKE_BUILD_PARALLEL_LEVEL="$(build_jobs)" TMPDIR="$2/tmp" \
        "$1" -m pip wheel --no-deps --no-cache-dir --wheel-dir "$2/wheel" --verbose \
        --config-settings "build.targets=llama;llama-common" --config-settings "ninja.make-fallback=false" \
        "$2"/sdist/llama_cpp_python-*.tar.gz
}

# As many as there are cores, and no more than fit into memory.
build_jobs() {
    local cores fit
    cores="$(nproc)"
    fit=$(($(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo) * 1024 / build_bytes_per_job))
    ((fit >= 1)) || fit=1
    printf '%d\n' "$((fit < cores ? fit : cores))"
}

# Reads the build's output; ninja says "[12/135] g++ ..." for each file. One moving line on a terminal, else every tenth.
show_build_progress() {
    local line next=1
    while IFS= read -r line; do
        [[ "$line" =~ ^\ *\[([0-9]+)/([0-9]+)\]\  ]] || continue
        local now="${BASH_REMATCH[1]}" all="${BASH_REMATCH[2]}"
        if [[ -t 1 ]]; then
            printf '\r   compiling llama.cpp [%d/%d]' "$now" "$all"
        elif ((now * 10 >= all * next || now == all)); then
            printf '   compiling llama.cpp [%d/%d]\n' "$now" "$all"
            next=$((now * 10 / all + 1))
        fi
    done
    [[ ! -t 1 ]] || printf '\n'
}

remove_build() {
    [[ -z "$building" ]] || rm -rf "$building"
    building=""
}
