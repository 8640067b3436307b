#!/usr/bin/env bash
# Builds llama-cpp-python for the processor of another machine, once, and prints the wheel's path. A portable build of
# llama.cpp leaves the fast kernels out, and a board takes up to an hour to compile its own.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/machine.sh
source "$here/scripts/machine.sh"
# shellcheck source=scripts/llama-wheel.sh
source "$here/scripts/llama-wheel.sh"

readonly build_megabytes=1500 # llama.cpp's source, its objects and the tools that build it

scratch=""

usage() {
    cat <<HELP
Usage: scripts/cross-wheel.sh [--cached] TARGET

Prints the path of llama-cpp-python's wheel for the target, which it compiles when it is not in the cache.

  rpi4            Raspberry Pi 4: Cortex-A72, without dot product instructions
  rpi5, rk3588    Cortex-A76: dot product, half precision
  jetson          Orin's Cortex-A78AE: as above; without CUDA, whose compiler is on the Jetson
  amd64           x86-64-v3: AVX2, FMA, F16C
  --cached        fail rather than compile

The wheels are kept in \$EDGED_CACHE (default: ~/.cache/edged).
HELP
}

# Sets what the target's processor is called, its machine name, and the instruction sets that llama.cpp may use.
choose_target() {
    case "$1" in
        rpi4) processor=cortex-a72 machine=aarch64 features=armv8-a ;;
        rpi5 | rk3588 | jetson) processor=cortex-a76 machine=aarch64 features=armv8.2-a+dotprod+fp16 ;;
        amd64) processor=x86-64-v3 machine=x86_64 features="SSE42 AVX AVX2 BMI2 FMA F16C" ;;
        *)
            complain "there is no target '$1'" "scripts/cross-wheel.sh --help lists them."
            exit 2
            ;;
    esac
}

# Replaces llama-wheel.sh's, which names the processor of this machine.
llama_key() {
    printf '%s-%s-%s\n' "$(llama_version)" "$machine" "$processor"
}

is_native() {
    [[ "$machine" == "$(uname -m)" ]]
}

check_machine() {
    need_python
    need_space "$(wheel_directory)" "$build_megabytes" "compiling llama.cpp"
    if is_native; then
        need_compiler
    else
        need_tool "$machine-linux-gnu-gcc" "gcc-${machine/_/-}-linux-gnu"
        need_tool "$machine-linux-gnu-g++" "g++-${machine/_/-}-linux-gnu"
    fi
}

# On x86-64 each is named: when cross-compiled, and where SOURCE_DATE_EPOCH is set, llama.cpp would leave them out.
cmake_arguments() {
    local each
    printf ' -DGGML_NATIVE=OFF'
    if [[ "$machine" == aarch64 ]]; then
        printf ' -DGGML_CPU_ARM_ARCH=%s' "$features"
    else
        for each in $features; do printf ' -DGGML_%s=ON' "$each"; done
    fi
    is_native || printf ' -DCMAKE_%s' "SYSTEM_NAME=Linux" "SYSTEM_PROCESSOR=$machine" \
        "C_COMPILER=$machine-linux-gnu-gcc" "CXX_COMPILER=$machine-linux-gnu-g++"
}

# The host platform is what names the wheel: pip believes it builds on that machine.
cross_build() {
    local log
    scratch="$(mktemp -d)"
    "$(find_python python_makes_venvs)" -m venv "$scratch/venv"
    log="$(dirname "$(wheel_directory)")/$(wheel_key).log"
    mkdir -p "$(dirname "$log")"
    CMAKE_ARGS="$(cmake_arguments)" _PYTHON_HOST_PLATFORM="linux-$machine" \
        build_wheel "$scratch/venv/bin/python" "$log" && return
    complain "could not compile llama.cpp for $processor"
    show_end_of_log "$log"
    return 1
}

clean_up() {
    remove_build
    [[ -z "$scratch" ]] || rm -rf "$scratch"
}

main() {
    local may_build=yes
    [[ "${1:-}" != --help && "${1:-}" != -h ]] || { usage && exit 0; }
    [[ "${1:-}" != --cached ]] || { may_build=no && shift; }
    choose_target "${1:-}"
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    if ! cached_wheel >/dev/null; then
        [[ "$may_build" == yes ]] || exit 1
        { ensure_machine check_machine && cross_build; } >&2
    fi
    cached_wheel
}

[[ "${BASH_SOURCE[0]}" != "$0" ]] || main "$@" # tests source this
