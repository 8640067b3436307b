# shellcheck shell=bash
# Which board this is, and how llama.cpp is compiled for it. Sourced after machine.sh, never run.
#
# Every function reads below `root`, which is empty but in tests. What the processor can do decides the build; the
# board's name is for people, and for what else a kind of board needs.

root="${root:-}"

# rpi5, rpi4, jetson, rk3588, rk3566, else arm64 or amd64.
board_name() {
    case "$(board_model)" in
        *"Raspberry Pi 5"* | *"Compute Module 5"*) printf 'rpi5\n' && return ;;
        *"Raspberry Pi 4"* | *"Compute Module 4"*) printf 'rpi4\n' && return ;;
    esac
    if [[ -f "$root/etc/nv_tegra_release" ]]; then
        printf 'jetson\n'
    elif has_chip rockchip,rk3588; then
        printf 'rk3588\n'
    elif has_chip rockchip,rk3566; then
        printf 'rk3566\n'
    else
        debian_architecture
    fi
}

# What the board calls itself; nothing on machines without a device tree.
board_model() {
    if [[ -r "$root/proc/device-tree/model" ]]; then tr -d '\0' <"$root/proc/device-tree/model"; fi
}

# has_chip VENDOR,CHIP: the device tree names it; a variant such as rk3588s counts.
has_chip() {
    [[ -r "$root/proc/device-tree/compatible" ]] && tr '\0' '\n' <"$root/proc/device-tree/compatible" | grep -q "^$1"
}

# As Debian calls this machine, whatever --arch says.
debian_architecture() {
    case "$(uname -m)" in
        x86_64) printf 'amd64\n' ;;
        aarch64) printf 'arm64\n' ;;
        *) uname -m ;;
    esac
}

# describe_board NAME: for people.
describe_board() {
    local model
    model="$(board_model)"
    case "$1" in
        jetson) printf '%s, L4T %s, %s\n' "${model:-Jetson}" "$(l4t_release)" "$(cuda_compiler || printf 'no CUDA compiler')" ;;
        amd64 | arm64) printf '%s\n' "${model:-$1}" ;;
        *) printf '%s (%s)\n' "$model" "$1" ;;
    esac
}

# From "# R36 (release), REVISION: 4.3, …": 36.4.3.
l4t_release() {
    sed -nE 's/^# R([0-9]+) \(release\), REVISION: ([0-9.]+).*/\1.\2/p' "$root/etc/nv_tegra_release"
}

# --- what llama.cpp is compiled with --------------------------------------------------------------------

# Arguments for cmake. None on x86-64, where the compiler knows its own processor.
llama_flags() {
    local cuda
    [[ "$(debian_architecture)" != arm64 ]] ||
        printf -- '-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=%s\n' "$(arm_architecture)"
    if [[ "$(board_name)" == jetson ]] && cuda="$(cuda_compiler)"; then
        printf -- '-DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER=%s -DCMAKE_CUDA_ARCHITECTURES=%s\n' "$cuda" "$(cuda_architecture)"
    fi
}

# By what the kernel found: armv8-a on a Cortex-A72, armv8.2-a+dotprod+fp16 on A76 and A78AE.
arm_architecture() {
    local extensions=""
    ! cpu_has asimddp || extensions+=+dotprod
    ! { cpu_has fphp && cpu_has asimdhp; } || extensions+=+fp16
    ! cpu_has i8mm || extensions+=+i8mm
    printf '%s%s\n' "${extensions:+armv8.2-a}" "${extensions:-armv8-a}"
}

cpu_has() {
    grep -m 1 '^Features' "$root/proc/cpuinfo" | grep -qw "$1"
}

# Prints nvcc's path; JetPack puts it where no PATH has it.
cuda_compiler() {
    local found="$root/usr/local/cuda/bin/nvcc"
    if [[ -x "$found" ]]; then printf '%s\n' "$found"; else command -v nvcc; fi
}

cuda_architecture() {
    if has_chip nvidia,tegra234; then
        printf '87\n' # Orin
    elif has_chip nvidia,tegra194; then
        printf '72\n' # Xavier
    else
        printf 'native\n'
    fi
}

# --- what a board should be told ------------------------------------------------------------------------

# Sentences, one a line; none when all is well.
board_advice() {
    if ! grep -qw memory "$root/sys/fs/cgroup/cgroup.controllers" 2>/dev/null; then
        printf 'the kernel accounts no memory to groups: a worker that needs too much can take edged with it'
        case "$(board_name)" in
            rpi*) printf '; add cgroup_enable=memory to /boot/firmware/cmdline.txt and reboot\n' ;;
            *) printf '; boot with cgroup v2 and its memory controller\n' ;;
        esac
    fi
}
