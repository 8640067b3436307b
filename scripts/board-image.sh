#!/usr/bin/env bash
# Makes the Debian image that the emulated boards boot, once for each recipe, and prints the directory it lies in:
# root.ext4 (sparse, never to be written: boot an overlay), vmlinuz, initrd, and the ssh key that root lets in.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/machine.sh
source "$here/scripts/machine.sh"

readonly suite=bookworm
readonly root_size=8G             # of which the image uses little: it is sparse, and so are the overlays
readonly build_megabytes=4000     # the tree, the image and the packages on their way
readonly debian=http://deb.debian.org/debian
readonly security=http://deb.debian.org/debian-security
readonly packages=(
    systemd systemd-sysv systemd-timesyncd udev dbus kmod # an init, and what cgroups and timers need
    openssh-server iproute2 ca-certificates procps less zstd
    python3 python3-venv libgomp1 adduser e2fsprogs sqlite3
    busybox-static # the initrd's
    python3-bpfcc # the probe's compiler; the kernel's headers come with the kernel below
)
# What no board under QEMU has, and what nobody reads there. It is most of the kernel package.
readonly left_out=(
    '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/info/*'
    '/lib/modules/*/kernel/sound/*' '/lib/modules/*/kernel/drivers/gpu/*' '/lib/modules/*/kernel/drivers/media/*'
    '/lib/modules/*/kernel/drivers/infiniband/*' '/lib/modules/*/kernel/drivers/staging/*'
    '/lib/modules/*/kernel/drivers/net/wireless/*' '/lib/modules/*/kernel/drivers/net/ethernet/*'
    '/lib/modules/*/kernel/drivers/scsi/*' '/lib/modules/*/kernel/drivers/ata/*'
    '/lib/modules/*/kernel/drivers/iio/*' '/lib/modules/*/kernel/net/wireless/*'
)

architecture=""
building=""

usage() {
    cat <<HELP
Usage: scripts/board-image.sh [--cached] amd64|arm64
       scripts/board-image.sh --packages DIRECTORY amd64|arm64 PACKAGE...

Prints the directory of the image, which it makes when it is not in the cache. Making it needs root.

  --cached               fail rather than make it
  --packages DIRECTORY   download Debian packages, with those they need that the image lacks, into the directory

The images are kept in \$EDGED_CACHE/boards (default: ~/.cache/edged/boards).
HELP
}

# --- where it lies --------------------------------------------------------------------------------------

# Whoever changes a line of the recipe gets a new image.
image_directory() {
    printf '%s/boards/%s-%s\n' "${EDGED_CACHE:-$HOME/.cache/edged}" "$architecture" "$(recipe | sha256sum | cut -c 1-12)"
}

recipe() {
    declare -p suite root_size packages left_out
    declare -f make_tree configure_tree configure_systemd make_initrd list_modules
}

is_cached() {
    [[ -f "$(image_directory)/root.ext4" ]]
}

# --- the machine ----------------------------------------------------------------------------------------

# What boots the image is wanted too, so that whoever got one can use it.
check_machine() {
    need_tool ssh openssh-client
    need_tool qemu-img qemu-utils
    case "$architecture" in
        amd64) need_tool qemu-system-x86_64 qemu-system-x86 ;;
        arm64) need_tool qemu-system-aarch64 qemu-system-arm ;;
    esac
    is_cached || need_tools_to_make_it
}

need_tools_to_make_it() {
    need_tool mmdebstrap mmdebstrap
    need_tool arch-test arch-test
    need_tool mkfs.ext4 e2fsprogs
    need_tool cpio cpio
    need_tool modprobe kmod
    need_space "$(image_directory)" "$build_megabytes" "a board's image"
    is_native || need_tool qemu-aarch64-static qemu-user-static
    is_native || need_tool update-binfmts binfmt-support
}

is_native() {
    [[ "$architecture" == "$(dpkg --print-architecture)" ]]
}

# Programs of the other architecture run through QEMU: the kernel must know how, and some machines do not mount this.
enable_foreign_programs() {
    [[ -e /proc/sys/fs/binfmt_misc/register ]] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    [[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]] || update-binfmts --enable qemu-aarch64
}

# The sources that this machine takes Debian from, for the suite of the image: a mirror nearby, when it has one.
package_sources() {
    local main_mirror security_mirror
    main_mirror="$(mirror_labelled Debian)"
    security_mirror="$(mirror_labelled Debian-Security)"
    printf 'deb %s %s main\n' "${main_mirror:-$debian}" "$suite" "${main_mirror:-$debian}" "$suite-updates" \
        "${security_mirror:-$security}" "$suite-security"
}

mirror_labelled() {
    apt-get indextargets --format "\$(REPO_URI)" "Label: $1" 'Identifier: Packages' 2>/dev/null | sed -n 1p
}

# What this machine's apt needs to reach that mirror.
package_options() {
    printf '// as on the machine that made this\n'
    apt-config dump | grep -E '^Acquire::(http|https|Check-Valid-Until|Check-Date)\b.* "[^"]+";' || true
}

# --- the tree -------------------------------------------------------------------------------------------

# INITRD=No keeps the kernel's package from making an initramfs, which takes ten minutes when emulated; make_initrd does
# it here. The host keys are there before the server's package would make them, for the same reason.
make_tree() {
    local excluded path
    excluded=()
    for path in "${left_out[@]}"; do excluded+=(--dpkgopt="path-exclude=$path"); done
    package_sources >"$building/sources.list"
    package_options >"$building/apt.conf"
    # shellcheck disable=SC2016 # the hook's $1 is mmdebstrap's to give
    INITRD=No mmdebstrap --mode=root --variant=minbase --format=directory --architectures="$architecture" \
        --include="$(tr ' ' , <<<"${packages[*]} linux-image-$architecture linux-headers-$architecture")" \
        --aptopt="$building/apt.conf" --aptopt='APT::Install-Recommends "false"' "${excluded[@]}" \
        --essential-hook='mkdir -p "$1/etc/ssh" && ssh-keygen -A -f "$1"' \
        "$suite" "$building/tree" "$building/sources.list"
}

configure_tree() {
    local tree="$1"
    rm -rf "$tree"/etc/apt/sources.list "$tree"/etc/apt/sources.list.d/* "$tree"/etc/apt/apt.conf.d/99mmdebstrap \
        "$tree"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$tree"/var/lib/apt/lists/* "$tree"/var/cache/apt/* "$tree"/var/log/*.log
    printf 'deb %s main\n' "$debian $suite" "$debian $suite-updates" "$security $suite-security" >"$tree/etc/apt/sources.list"
    printf 'board\n' >"$tree/etc/hostname"
    printf '127.0.0.1 localhost board\n::1 localhost\n' >"$tree/etc/hosts"
    printf '/dev/vda / ext4 defaults 0 1\n' >"$tree/etc/fstab"
    : >"$tree/etc/machine-id" # made at the first boot of each overlay
    install -D -m 644 /dev/stdin "$tree/etc/systemd/network/80-user.network" <<<$'[Match]\nName=e*\n[Network]\nDHCP=ipv4'
    printf 'nameserver 10.0.2.3\n' >"$tree/etc/resolv.conf"
    ssh-keygen -q -t ed25519 -N '' -C board -f "$building/key"
    install -D -m 600 "$building/key.pub" "$tree/root/.ssh/authorized_keys"
    chmod 700 "$tree/root/.ssh"
    configure_systemd "$tree"
}

# The journal outlives a power cut, so that a failure can be read afterwards. Timers that only cost time are off.
configure_systemd() {
    local tree="$1" unit
    mkdir -p "$tree/var/log/journal"
    systemctl --root="$tree" enable systemd-networkd.service ssh.service
    for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
        fstrim.timer systemd-networkd-wait-online.service; do
        systemctl --root="$tree" mask "$unit"
    done
}

# --- what it boots by -----------------------------------------------------------------------------------

# A handful of modules and one busybox: Debian's own initramfs would take longer to make and to unpack than all else.
make_initrd() {
    local tree="$1" version="$2" initrd="$building/initrd.tree"
    mkdir -p "$initrd"/{bin,modules,dev,proc,sys,root}
    install -m 755 "$tree/bin/busybox" "$initrd/bin/busybox"
    list_modules "$tree" "$version" | while read -r module; do
        cp "$module" "$initrd/modules/"
        printf '/modules/%s\n' "${module##*/}"
    done >"$initrd/modules/order"
    install -m 755 /dev/stdin "$initrd/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
while read -r module; do /bin/busybox insmod "$module"; done </modules/order
until [ -b /dev/vda ]; do :; done
/bin/busybox mount -o ro /dev/vda /root || exec /bin/busybox sh
/bin/busybox mount --move /dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
INIT
    (cd "$initrd" && find . | cpio --quiet -o -H newc -R 0:0) >"$building/initrd"
}

# The files of the modules that find the disk and mount it, each after those it needs.
list_modules() {
    local module
    for module in virtio_pci virtio_blk ext4 crc32c_generic; do
        modprobe --dirname "$1" --set-version "$2" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

build_image() {
    local directory version tree
    directory="$(image_directory)"
    mkdir -p "${directory%/*}"
    building="$(mktemp -d "${directory%/*}/.building.XXXXXX")"
    tree="$building/tree"
    step "Debian $suite for $architecture"
    is_native || enable_foreign_programs
    make_tree
    step "its configuration, kernel and disk"
    configure_tree "$tree"
    version="$(basename "$(readlink -f "$tree/vmlinuz")" | sed 's/^vmlinuz-//')"
    make_initrd "$tree" "$version"
    mkdir "$building/image"
    cp "$tree/boot/vmlinuz-$version" "$building/image/vmlinuz"
    mv "$building"/{initrd,key,key.pub} "$building/image/"
    truncate -s "$root_size" "$building/image/root.ext4"
    mkfs.ext4 -q -L board -d "$tree" "$building/image/root.ext4"
    mv -T "$building/image" "$directory"
    end_step
}

# --- packages for it --------------------------------------------------------------------------------------

# download_packages DIRECTORY PACKAGE...: apt decides as it would on the image, by the image's own list of packages.
download_packages() {
    local target options
    target="$(realpath -- "$1")"
    building="$(mktemp -d)"
    mkdir -p "$building"/{state/lists/partial,cache/archives/partial}
    package_sources | sed 's|^deb |deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] |' >"$building/sources.list"
    package_options >"$building/apt.conf"
    PATH="$PATH:/usr/sbin:/sbin" debugfs -R "dump /var/lib/dpkg/status $building/status" "$(image_directory)/root.ext4"
    options=(-q -y -c "$building/apt.conf" -o "APT::Architecture=$architecture" -o "APT::Architectures::=$architecture"
        -o "Dir::Etc::SourceList=$building/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State=$building/state"
        -o "Dir::State::status=$building/status" -o "Dir::Cache=$building/cache" -o APT::Sandbox::User=root
        -o APT::Install-Recommends=false)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" --download-only install "${@:2}"
    cp "$building"/cache/archives/*.deb "$target/"
}

# --- all of it ----------------------------------------------------------------------------------------------

make_if_missing() {
    ensure_machine check_machine
    is_cached && return
    [[ "$(id -u)" == 0 ]] || { complain "making a board's image needs root" && exit 1; }
    build_image
}

clean_up() {
    [[ -z "$building" ]] || rm -rf --one-file-system "$building"
}

main() {
    local may_build=yes packages_into=""
    [[ "${1:-}" != --help && "${1:-}" != -h ]] || { usage && exit 0; }
    [[ "${1:-}" != --cached ]] || { may_build=no && shift; }
    [[ "${1:-}" != --packages ]] || { packages_into="${2:?a directory}" && shift 2; }
    architecture="${1:-}"
    if [[ "$architecture" != amd64 && "$architecture" != arm64 ]]; then
        complain "there is no board '$architecture'" "scripts/board-image.sh --help lists them."
        exit 2
    fi
    if [[ "$may_build" == yes ]]; then
        trap clean_up EXIT
        trap 'exit 130' INT TERM HUP
        make_if_missing >&2
    fi
    if [[ -n "$packages_into" ]]; then
        download_packages "$packages_into" "${@:2}" >&2
        return
    fi
    is_cached && image_directory
}

main "$@"
