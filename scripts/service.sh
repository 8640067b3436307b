# shellcheck shell=bash
# edged as a service of systemd: installed, upgraded with a way back, removed. Sourced by install-edge.sh, never run.
#
# Each version has a directory of its own below the prefix, and the link `current` says which one serves. A version is
# made and tried beside the one that serves; only then is the service stopped, for as long as a start takes.

: "${here:?} ${architecture:?} ${offline:?} ${dry_run:?} ${purge:?}" # install-edge.sh sets them, and these:
: "${bundle?} ${key?} ${model?} ${broker?}"

# It sets root, which is empty but in tests.
# shellcheck source=scripts/board.sh
source "$here/scripts/board.sh"
readonly service_user=edged
readonly config_dir="$root/etc/edged"
readonly device_key="$config_dir/bundle.pub"
readonly config_file="$config_dir/edged.toml"
readonly data_dir="$root/var/lib/edged"
readonly cache_dir="$root/var/cache/edged"
readonly local_broker=mqtt://127.0.0.1:1883
readonly unit_dir="$root/etc/systemd/system"
readonly probe_user=edged-probe
readonly store_names=(events.db knowledge.db)
readonly units=(edged.service edged.socket edged.slice edged-probe.service)
readonly device_drop_in="$unit_dir/edged.service.d/devices.conf"
readonly command_path="$root/usr/local/bin/edged"
readonly wrapper_mark="# Made by install-edge.sh: edged with the service's configuration."
readonly venv_megabytes=700           # one version and the models
readonly version_megabytes=400        # one version alone
readonly build_megabytes=1500         # llama.cpp's source, its objects and the tools that build it
readonly ready_seconds="${EDGED_READY_SECONDS:-900}" # for a start with its models, on a slow board
readonly answer_seconds=60            # for /health, on a slow board that loads its models
readonly starts_that_fail=3           # a version that ended so often is not waited for any longer

# shellcheck source=scripts/broker.sh
source "$here/scripts/broker.sh"

unpacked=""       # the bundle, checked
coming=()         # Debian packages that will be installed from it: what they bring counts as there
parts="$here"     # the installer, units and documents of what is installed
pythons=(3.11 3.12 3.13)
stores="$data_dir" # where the databases lie, as the configuration says
switching_from="" # the version to go back to while another one is tried
scratch=""        # removed at the end

# --- this machine ---------------------------------------------------------------------------------------

check_service_machine() {
    need_space "$prefix" "$venv_megabytes" "edged and its models"
    python_comes || need_python
    [[ "$broker" != local ]] || comes mosquitto || need_tool mosquitto_passwd mosquitto
    if [[ -n "$unpacked" ]]; then
        need_space_for_models
        return
    fi
    if [[ "$offline" == yes ]]; then
        is_whole "$(wanted_version)" || lacks "a bundle (--bundle FILE), or this version, installed already"
        return
    fi
    cached_wheel >/dev/null && return
    need_compiler
    need_space "$(wheel_directory)" "$build_megabytes" "compiling llama.cpp"
}

comes() {
    [[ " ${coming[*]} " == *" $1 "* ]]
}

python_comes() {
    local each
    for each in "${pythons[@]}"; do
        ! comes "python$each-venv" || return 0
    done
    return 1
}

# They are copied while the bundle still lies beside the versions. Those that are there already are not.
need_space_for_models() {
    local file copy bytes=0 megabytes
    for file in "$unpacked"/models/*; do
        copy="$cache_dir/models/${file##*/}"
        [[ ! -e "$file" || -e "$copy" ]] ||
            bytes=$((bytes + $(stat -c %s "$file") - $(stat -c %s "$copy.new" 2>/dev/null || printf 0)))
    done
    ((bytes > 0)) || return 0
    megabytes=$((bytes / 1048576 + 1))
    ! on_one_disk "$prefix" "$cache_dir" || megabytes=$((megabytes + version_megabytes))
    need_space "$cache_dir" "$megabytes" "the bundle's models"
}

# Replaces llama-wheel.sh's: with CUDA it is another build for the same processor.
llama_key() {
    printf '%s-%s-%s%s\n' "$(llama_version)" "$(uname -m)" "$(processor_hash)" \
        "$([[ "$(llama_flags)" != *CUDA* ]] || printf -- '-cuda%s' "$(cuda_architecture)")"
}

# Everything that can be refused is refused here, before anything is changed.
check_service() {
    local board
    [[ "$(getconf LONG_BIT)" == 64 ]] || give_up "edged needs a 64-bit Linux" "Nothing was changed."
    board="$(board_name)"
    [[ "$architecture" == auto || "$architecture" == "$(debian_architecture)" ]] ||
        give_up "this machine is $(debian_architecture), not $architecture" "Nothing was changed."
    say "$(describe_board "$board"), $(nproc) cores; edged goes to $prefix"
    check_settings
    [[ "$broker" != local ]] || check_broker
    [[ -z "$bundle" ]] || open_bundle
    if [[ "$offline" == yes ]]; then
        mapfile -t coming < <(packages_wanted)
        check_offline "Nothing was changed"
        check_models
        if [[ "$dry_run" == yes ]]; then
            say_packages
        elif ((${#coming[@]})); then
            offline_packages
            coming=()
            check_offline "edged was left as it was"
        fi
    elif [[ "$dry_run" == yes ]]; then
        check_service_machine
    else
        ensure_machine check_service_machine || give_up "" "edged was left as it was."
    fi
}

# check_offline LEFT: nothing is missing but what comes with the bundle.
check_offline() {
    check_service_machine
    lacks_nothing || { report_missing && give_up "" "$1: --offline takes nothing from the network."; }
}

# A model that an installed configuration names comes with the bundle, or is there: else it would come from the network.
check_models() {
    local kind name home cache advice=()
    [[ -e "$config_file" ]] || return 0
    home="$(said home)" && cache="$(said cache)" || return 0 # the check with the new version says why
    home="${home:-~/.local/share/edged}" cache="${cache:-~/.cache/edged}" # config.py's defaults
    home="${home/#\~/"$data_dir"}" cache="${cache/#\~/"$data_dir"}"
    [[ ! -x "$prefix/current/bin/edged" ]] || advice=(", or bring the model first:" "edged models import FILE")
    for kind in chat embed; do
        name="$(said "$kind.model")" || return 0
        [[ -n "$name" && -z "$(said "$kind.path")" ]] || continue
        [[ -z "$unpacked" ]] || ! from_bundle models | grep -xF "$name" >/dev/null || continue
        grep -qsF "\"name\": \"$name\"" {"$home","$cache","$cache_dir"}/models/*.gguf.json ||
            give_up "$config_file names the model $name, which is neither installed nor in the bundle" \
                "Nothing was changed. Name a bundle that was made with --model $name${advice[0]:-.}" "${advice[@]:1}"
    done
}

# An installed configuration is its owner's. What is asked for must stand in it already: else the option would be dropped,
# and a broker with passwords would lock edged out.
check_settings() {
    [[ -e "$config_file" ]] || return 0
    if [[ "$broker" == local ]]; then
        { says mqtt.url "$local_broker" && says mqtt.username edged && says mqtt.password_file "$config_dir/mqtt-password"; } ||
            refuse_to_change --broker "$(mqtt_text)" "Then run this again, and after it: systemctl restart edged"
    elif [[ -n "$broker" ]]; then
        says mqtt.url "$broker" || refuse_to_change --broker "$(mqtt_text)" "Then: edged check && systemctl restart edged"
    fi
    [[ -z "$model" ]] || says chat.model "$model" ||
        refuse_to_change --model "$(chat_text "$model")" \
            "Then run this again, and after it: edged models pull $model && systemctl restart edged"
}

# says NAME VALUE: the installed configuration has this setting, in the file or by default.
says() {
    local found
    found="$(said "$1")" || return
    [[ -n "$found" || "$1" != mqtt.url ]] || found="$local_broker"
    [[ "$found" == "$2" ]]
}

# said NAME: what the file says, or nothing. Fails where it cannot be read.
said() {
    "$(find_python)" -I -c '
import sys, tomllib
with open(sys.argv[1], "rb") as opened:
    value = tomllib.load(opened)
for key in sys.argv[2].split("."):
    value = value.get(key, {})
print(value or "")' "$config_file" "$1" 2>/dev/null
}

# refuse_to_change OPTION LINES THEN
refuse_to_change() {
    local lines
    mapfile -t lines <<<"$2"
    give_up "$config_file is there, and does not say what $1 asks for" \
        "Nothing was changed. Without $1 the file is kept as it is; else set in it:" \
        "${lines[@]/#/    }" "$3"
}

# --- the bundle -----------------------------------------------------------------------------------------

# Into a directory of root's beside the versions: what is installed from it must be what was checked.
open_bundle() {
    local checker signer complaint versions lines advice
    offline=yes
    [[ -e "$bundle" ]] || give_up "there is no bundle $bundle" "Nothing was changed."
    checker="$(find_checker)" || give_up "the bundle cannot be checked: there is no Python from 3.9 on" \
        "Nothing was changed. Install Debian's package python3 first."
    need_space "$prefix" "$(($(du -sm "$bundle" | cut -f 1) + venv_megabytes))" "the bundle and what it holds"
    lacks_nothing || { report_missing && give_up "" "Nothing was changed."; }
    make_scratch
    signer="$(bundle_key)"
    [[ -z "$signer" ]] || cp -- "$signer" "$scratch/bundle.pub" 2>/dev/null ||
        give_up "the key $signer cannot be read" "Nothing was changed."
    mapfile -t versions < <(pythons_here)
    complaint="$("$checker" -I "$here/scripts/bundle.py" ${signer:+--key "$scratch/bundle.pub"} "$bundle" "$scratch/bundle" \
        "$(uname -m)" "${versions[@]}" 2>&1 >/dev/null)" || {
        mapfile -t lines <<<"${complaint//"$scratch/bundle.pub"/"$signer"}"
        advice="${lines[1]:-copy or make it again${signer:+; it must be signed by the key in $signer}}"
        give_up "the bundle $bundle cannot be used: ${lines[0]}" "Nothing was changed. ${advice^}." "${lines[@]:2}"
    }
    use_bundle "$scratch/bundle"
    say "the bundle is whole${signer:+, and signed by the key in $signer}"
}

use_bundle() {
    unpacked="$1"
    [[ ! -d "$unpacked/installer" ]] || parts="$unpacked/installer"
    mapfile -t pythons < <(from_bundle python)
    # shellcheck disable=SC2034 # machine.sh's
    python_range="${pythons[*]}"
    [[ -z "$model" ]] || from_bundle models | grep -qxF "$model" ||
        give_up "the bundle has no model $model" "Nothing was changed. It has: $(from_bundle models | tr '\n' ' ')"
}

# The one given, else the one that this device was installed with; without either, nobody's signature is asked for.
bundle_key() {
    if [[ -n "$key" ]]; then
        printf '%s\n' "$key"
    elif [[ -e "$device_key" ]]; then
        printf '%s\n' "$device_key"
    fi
}

# As it was when the bundle was checked by it.
keep_key() {
    [[ -n "$key" ]] || return 0
    ! cmp -s "$scratch/bundle.pub" "$device_key" || return 0
    place "$device_key" root:root 644 <"$scratch/bundle.pub"
    say "made: $device_key; bundles that it did not sign are refused from now on"
}

# Any Python that can check a bundle: the one that edged is to run with may only come with it.
find_checker() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

pythons_here() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        "$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
    done | sort -u
}

# from_bundle KEY: what the manifest says, each value on a line.
from_bundle() {
    "$(find_checker)" -I -c '
import json, sys
said = json.load(open(sys.argv[1])).get(sys.argv[2], [])
for value in [said] if isinstance(said, str) else said:
    print(value)' "$unpacked/manifest.json" "$1"
}

# Replaces machine.sh's: what comes with a bundle is for the Pythons that it names.
python_in_range() {
    "$1" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' "${pythons[@]}" 2>/dev/null
}

make_scratch() {
    local parent="$prefix"
    [[ "$dry_run" == no ]] || parent=/var/tmp
    [[ -n "$scratch" ]] || scratch="$(make_own_directory "$parent" edged-install)"
}

# Debian packages that came with the bundle: apt takes from them what this system lacks, and nothing from elsewhere.
offline_packages() {
    local log="$scratch/apt.log"
    export DEBIAN_FRONTEND=noninteractive
    mkdir -p "$scratch"/apt/{lists,archives}/partial
    printf 'deb [trusted=yes] file:%s ./\n' "$unpacked/debs" >"$scratch/apt/sources.list"
    if ! { offline_apt update && finish_packages offline_apt && offline_apt install "${coming[@]}"; } \
        </dev/null >"$log" 2>&1; then
        complain "could not install the bundle's Debian packages: ${coming[*]}"
        show_end_of_log "$log"
        give_up "" "edged was left as it was. Where this system's packages are newer than the bundle's, make the" \
            "bundle again, or bring these packages from the network: $(sudo_word)apt-get install ${coming[*]}" \
            "Where apt says that it wanted to remove packages, none was: remove them yourself if they may go."
    fi
    say "installed from the bundle: ${coming[*]}"
}

offline_apt() {
    apt_get -o Acquire::Languages=none \
        -o Dir::Etc::SourceList="$scratch/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$scratch/apt/lists" -o Dir::Cache="$scratch/apt" \
        -o APT::Sandbox::User=root -o DPkg::Lock::Timeout=120 "$@"
}

# Those that came for this very release and are not there: packages of another would not fit.
packages_wanted() {
    local package
    [[ -n "$unpacked" ]] || return 0
    grep -qsE "^(VERSION|UBUNTU)_CODENAME=\"?$(from_bundle suite)\"?\$" /etc/os-release || return 0
    from_bundle packages | while read -r package; do
        dpkg-query --show --showformat '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
            printf '%s\n' "$package"
    done
}

say_packages() {
    ((${#coming[@]} == 0)) || say "would install from the bundle: ${coming[*]}"
}

# --- what is wanted and what is there ---------------------------------------------------------------------

# A name for what would be installed: its version, and a sum of all it is made from.
wanted_version() {
    local version content
    version="$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/pyproject.toml")"
    if [[ -n "$unpacked" ]]; then
        version="$(from_bundle edged)"
        content="$(cat "$unpacked/manifest.json" "$parts"/systemd/* | sha256sum)"
    else
        content="$({
            cd "$here" && wheel_key && find edged models systemd pyproject.toml README.md LICENSE -type f \
                -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
        } | sha256sum)"
    fi
    printf '%s-%s\n' "${version:-0}" "${content:0:12}"
}

current_version() {
    basename "$(readlink "$prefix/current" 2>/dev/null || true)"
}

is_whole() {
    [[ -f "$prefix/versions/$1/whole" ]] && venv_works "$prefix/versions/$1"
}

# serves NAME: it is whole, it is the current one, and it is well.
serves() {
    is_whole "$1" && [[ "$(current_version)" == "$1" ]] && is_well "$1"
}

# is_well NAME: /health of the service is no longer failing. Somebody else's edged at its port is not the service, and a
# socket that systemd holds takes requests that nobody answers.
is_well() {
    as_edged timeout "$answer_seconds" "$prefix/versions/$1/bin/edged" status &>/dev/null &&
        systemctl is-active --quiet edged.service
}

# --- user, directories, key, configuration ------------------------------------------------------------------

prepare_service() {
    mkdir -p "$state" || give_up "cannot write to $prefix" "Nothing was changed. Choose another --prefix."
    exec 9>"$state/lock"
    flock -n 9 || give_up "another install-edge.sh is at work in $prefix" "Wait for it to end, then run this again."
}

make_user() {
    getent group "$service_user" >/dev/null || groupadd --system "$service_user"
    getent passwd "$service_user" >/dev/null ||
        useradd --system --gid "$service_user" --home-dir "$data_dir" --no-create-home --shell /usr/sbin/nologin "$service_user"
    getent passwd "$probe_user" >/dev/null ||
        useradd --system --gid "$service_user" --no-create-home --shell /usr/sbin/nologin "$probe_user"
    install -d -o root -g "$service_user" -m 750 "$config_dir"
    install -d -o "$service_user" -g "$service_user" -m 750 "$data_dir" "$cache_dir"
    make_secret "$config_dir/api-key" "root:$service_user" 640
    let_devices_in
}

# place FILE OWNER:GROUP MODE: what stands on standard input, all or nothing, whenever the power fails.
place() {
    local new="$1.new"
    (umask 077 && cat >"$new") && chown "$2" "$new" && chmod "$3" "$new" && sync "$new" && mv "$new" "$1"
}

# Everything installed is on the disk when this returns.
reach_disk() {
    sync --file-system "$prefix" "$config_dir" "$data_dir" "$cache_dir" "$unit_dir" "${command_path%/*}"
}

# make_secret FILE OWNER:GROUP MODE: 32 random bytes, in hex, once.
make_secret() {
    [[ ! -s "$1" ]] || return 0
    printf '%s\n' "$(od -An -v -tx1 -N 32 /dev/urandom | tr -d ' \n')" | place "$1" "$2" "$3"
    say "made: $1"
}

make_config() {
    if [[ -e "$config_file" ]]; then
        say "kept: $config_file"
        return
    fi
    config_text | place "$config_file" "root:$service_user" 640
    say "made: $config_file"
}

# Of many devices of one host name at one broker each has its own, which stays when the host is renamed.
name_at_broker() {
    printf 'edged-%s-%s' "$(uname -n)" "$(head -c 6 /etc/machine-id)"
}

config_text() {
    local chat embed
    printf '# docs/CONFIG.md lists every setting. Check with "edged check", then "systemctl reload edged".\n'
    printf 'home = "%s"\ncache = "%s"\n\n[http]\napi_key_file = "%s"\n' "$data_dir" "$cache_dir" "$config_dir/api-key"
    [[ -z "$broker" ]] || { printf '\n' && mqtt_text; }
    chat="$model" embed=""
    [[ -z "$unpacked" ]] || { chat="${model:-$(from_bundle chat)}" && embed="$(from_bundle embed)"; }
    [[ -z "$chat" ]] || { printf '\n' && chat_text "$chat"; }
    [[ -z "$embed" ]] || printf '\n[embed]\nmodel = "%s"\n' "$embed"
}

mqtt_text() {
    if [[ "$broker" == local ]]; then
        printf '[mqtt]\nurl = "%s"\nusername = "edged"\npassword_file = "%s"\n' "$local_broker" "$config_dir/mqtt-password"
    else
        printf '[mqtt]\nurl = "%s"\nclient_id = "%s"\n' "$broker" "$(name_at_broker)"
    fi
}

chat_text() {
    printf '[chat]\nmodel = "%s"\n' "$1"
}

# The unit hides all devices. A Jetson's GPU is reached through some of them; through one a Raspberry Pi's firmware says
# whether it slows the processor down.
let_devices_in() {
    local settings
    case "$(board_name)" in
        jetson) settings='PrivateDevices=no\nDevicePolicy=auto\nSupplementaryGroups=video\n' ;;
        rpi*) settings='PrivateDevices=no\nDeviceAllow=/dev/vcio\nSupplementaryGroups=video\n' ;;
        *) return 0 ;;
    esac
    mkdir -p "${device_drop_in%/*}"
    printf '# Made by install-edge.sh for this board.\n[Service]\n%b' "$settings" | place "$device_drop_in" root:root 644
}

# --- a version ------------------------------------------------------------------------------------------------

# make_version NAME: whole or not at all.
make_version() {
    local directory="$prefix/versions/$1" from=()
    is_whole "$1" && say "$directory is there" && return
    rm -rf "$directory"
    mkdir -p "$prefix/versions"
    run_logged venv "make the Python environment" "$(find_python python_makes_venvs)" -m venv "$directory"
    if [[ -n "$unpacked" ]]; then
        # From nowhere else, whatever the environment and pip's configuration say.
        export PIP_CONFIG_FILE=/dev/null
        from=(--isolated --no-index --find-links "$unpacked/wheels" edged)
    else
        make_service_wheel "$directory"
        run_logged pip-llama "install llama-cpp-python" \
            "$directory/bin/python" -m pip install --force-reinstall --no-deps "$(cached_wheel)"
        from=("${here}[convert]")
    fi
    say "edged and the packages it needs"
    run_logged pip-edged "install edged" "$directory/bin/python" -m pip install "${from[@]}"
    run_logged import "load llama.cpp" "$directory/bin/python" -c 'import edged, llama_cpp'
    install -D -m 644 -t "$directory/share/doc/edged" "$parts"/docs/*.md
    install -D -m 644 -t "$directory/systemd" "$parts"/systemd/*
    sed -i "s|/opt/edged|$prefix|g" "$directory"/systemd/*
    keep_installer "$directory/installer"
    sync --file-system "$prefix" # before the mark: a power cut must not leave the mark of what it took
    touch "$directory/whole"
}

# For the next bundle, and to remove the service: what checks a bundle must not come with it.
keep_installer() {
    install -D -m 755 -t "$1" "$parts/install-edge.sh"
    install -D -m 644 -t "$1" "$parts/pyproject.toml"
    install -D -m 755 -t "$1/scripts" "$parts"/scripts/{*.sh,bundle.py}
    # An older bundle has none.
    [[ ! -d "$parts/scripts/llama" ]] || install -D -m 644 -t "$1/scripts/llama" "$parts"/scripts/llama/*
    install -D -m 644 -t "$1/systemd" "$parts"/systemd/*
    install -D -m 644 -t "$1/docs" "$parts"/docs/*.md
}

make_service_wheel() {
    local log="$state/llama-build.log"
    cached_wheel >/dev/null && return
    CMAKE_ARGS="$(llama_flags | tr '\n' ' ')" build_wheel "$1/bin/python" "$log" || failed_logged "$log" "compile llama.cpp"
}

# as_edged COMMAND…: as the service runs it, but for what systemd keeps from it.
as_edged() {
    (
        cd "$data_dir" || exit
        keep_network_settings
        export HOME="$data_dir" LANG=C.UTF-8 EDGED_CONFIG="$config_file"
        exec setpriv --reuid "$service_user" --regid "$service_user" --init-groups "$@" 9>&-
    )
}

# Of root's environment: where a plant lets nobody out but through a proxy, or has packages of its own.
keep_network_settings() {
    local name
    for name in $(compgen -e); do
        case "${name^^}" in
            PATH | HTTP_PROXY | HTTPS_PROXY | ALL_PROXY | NO_PROXY | SSL_CERT_FILE | SSL_CERT_DIR) ;;
            PIP_INDEX_URL | PIP_EXTRA_INDEX_URL | PIP_FIND_LINKS | PIP_NO_INDEX | PIP_TRUSTED_HOST | PIP_CERT | PIP_PROXY) ;;
            *) unset "$name" ;;
        esac
    done
}

# copy_as_edged FILE TARGET: of a file that root may read, into a directory of edged's. A model that is there already is
# left: it is linked with the one in edged's home, and a copy in its place would be a second one on the disk.
copy_as_edged() {
    as_edged cmp -s - "$2" <"$1" && return
    as_edged dd of="$2.new" bs=1M status=none <"$1" && as_edged chmod 640 "$2.new" &&
        as_edged mv "$2.new" "$2" && return
    as_edged rm -f "$2.new"
    return 1
}

pull_service_models() {
    local edged="$prefix/versions/$1/bin/edged" file cache settings=() options=()
    [[ ! -d "$cache_dir/models" ]] || # of a run that was cut short
        as_edged find "$cache_dir/models" -maxdepth 1 -type f -name '*.new' -delete
    if [[ -n "$unpacked" && -d "$unpacked/models" ]]; then
        # As edged, whose directory it is: root would follow a link that edged put there.
        as_edged install -d -m 750 "$cache_dir/models"
        for file in "$unpacked"/models/*; do
            copy_as_edged "$file" "$cache_dir/models/${file##*/}" ||
                give_up "could not copy the bundle's models" "$(what_is_left)" "Make room in $cache_dir, then run this again."
        done
    fi
    [[ "$offline" == no ]] || ! knows_offline "$edged" || options=(--offline)
    cache="$(said cache)" || cache=""
    if [[ -n "$unpacked" && "$cache" != "$cache_dir" ]]; then
        # The bundle's are elsewhere. Only what is not there already is looked for: it would be copied to that disk.
        ((${#options[@]} == 0)) || ! as_edged "$edged" models pull "${options[@]}" &>/dev/null || return 0
        settings=(env EDGED_CACHE="$cache_dir")
    fi
    as_edged "${settings[@]}" "$edged" models pull "${options[@]}" ||
        give_up "could not bring the models" "$(what_is_left)" "Once the cause is mended, run this again."
}

# An older bundle's edged does not. Without -q: grep would leave, and the pipe fail because the program's reader is gone.
knows_offline() {
    as_edged env COLUMNS=200 "$1" models pull --help | grep -e --offline >/dev/null
}

# The new version reads the configuration that is there, and brings copies of the stores to its schema.
rehearse() {
    local edged="$prefix/versions/$1/bin/edged"
    as_edged "$edged" check --stores >"$state/check.log" 2>&1 || failed_logged "$state/check.log" "check configuration and data with the new version"
    grep -E '^(warning|store)' "$state/check.log" | sed 's/^/   /' || true
    stores="$(sed -n 's/^home: //p' "$state/check.log" | grep . || printf '%s' "$data_dir")" # an older version does not say
}

migrates() {
    grep -q '^store .* → ' "$state/check.log"
}

# --- changing versions ------------------------------------------------------------------------------------------

# serve_version NAME: it serves, or the one before does again.
serve_version() {
    local kept="$stores/before-$1" noted
    switching_from="$(current_version)"
    stop_service
    if read -r noted _ 2>/dev/null <"$unfinished" && is_whole "$noted"; then
        # A power cut came between two versions. What serves now never became ready: the way back is still the same.
        read -r switching_from _ kept <"$unfinished"
    else
        rm -rf "$kept"
    fi
    [[ -d "$kept" ]] || ! migrates || keep_stores "$kept"
    if [[ -n "$switching_from" && "$switching_from" != "$1" ]]; then
        as_edged rm -f "$stores/run/ready"
        note_switch "$switching_from" to "$kept"
    fi
    reach_disk
    switch_to "$1"
    systemctl enable --quiet edged.service
    if start_service && becomes_ready "$1"; then
        systemctl try-restart --no-block edged-probe.service # where somebody enabled it: of the same version
        [[ -z "$switching_from" || "$switching_from" == "$1" ]] || ln -sfn "versions/$switching_from" "$prefix/previous"
        switching_from=""
        end_switch "$kept"
        return
    fi
    show_why_not
    [[ -n "$switching_from" && "$switching_from" != "$1" ]] ||
        give_up "the service does not become ready" "It is installed and goes on trying: journalctl -u edged" \
            "Mend the cause, then run this again."
    go_back "$1"
    give_up "$1 does not become ready; $(current_version) serves again" \
        "Configuration, models and data are as they were. What it said is above, and in: journalctl -u edged"
}

# note_switch OLD to|back KEPT: for the run after a power cut. It stays until one of the two versions is settled on.
note_switch() {
    printf '%s %s %s\n' "$@" | place "$unfinished" root:root 644
}

# end_switch KEPT: the note first, and for good: with it, half of what was kept would be brought back.
end_switch() {
    rm -f "$unfinished"
    sync "${unfinished%/*}"
    rm -rf "$1"
}

# settle_switch WANTED: after a power cut between two versions. Where the newer one became ready meanwhile, or was never
# switched to, it is over; a way back that was begun, or is wanted now, is gone to its end.
settle_switch() {
    local old phase kept
    read -r old phase kept 2>/dev/null <"$unfinished" || return 0
    if [[ "$phase" == to ]]; then
        if [[ "$(current_version)" == "$old" || -e "${kept%/*}/run/ready" ]] || serves "$(current_version)"; then
            end_switch "$kept"
            return
        fi
        [[ "$old" == "$1" ]] || return 0
        note_switch "$old" back "$kept"
    fi
    say "going back to $old: the power failed between two versions"
    switching_from="$old" # if this run fails from here on, that one serves
    stop_service
    bring_back "$old" "$kept"
}

stop_service() {
    systemctl stop edged.socket edged.service 2>/dev/null || true
}

# keep_stores DIRECTORY: all or nothing, of files at rest: nobody has them open. As edged, in whose directory they lie.
# Beside them a place for what the newer version will have made: going back needs no room.
keep_stores() {
    local store file
    rm -rf "$1.new"
    as_edged mkdir -m 700 "$1.new" "$1.new/failed"
    for store in "${store_names[@]}"; do
        [[ -e "$stores/$store" ]] || as_edged touch "$1.new/no-$store"
        for file in "$stores/$store"*; do
            [[ ! -e "$file" ]] || as_edged cp -p --reflink=auto "$file" "$1.new/"
        done
    done
    sync --file-system "$1.new"
    as_edged mv "$1.new" "$1"
}

switch_to() {
    local directory="$prefix/versions/$1" unit
    for unit in "${units[@]}"; do
        place "$unit_dir/$unit" root:root 644 <"$directory/systemd/$unit" || return
    done
    ln -sfn "versions/$1" "$prefix/current.new" && mv -T "$prefix/current.new" "$prefix/current" &&
        sync --file-system "$prefix" "$unit_dir" && systemctl daemon-reload
}

start_service() {
    systemctl reset-failed edged.service 2>/dev/null || true
    ! systemctl is-enabled --quiet edged.socket 2>/dev/null || systemctl start edged.socket || return
    # Without waiting for READY: a version that ends again and again is noticed sooner by looking.
    systemctl start --no-block edged.service
}

# becomes_ready NAME: within its time, /health of that version is no longer failing.
becomes_ready() {
    local deadline=$((SECONDS + ready_seconds))
    say "waiting for it to become ready"
    while ((SECONDS < deadline)); do
        is_well "$1" && return
        (($(systemctl show --property NRestarts --value edged.service) < starts_that_fail)) || return
        sleep 2
    done
    return 1
}

show_why_not() {
    complain "the service is not ready. Its last words:"
    journalctl --unit edged.service --lines 15 --output cat --no-pager 2>/dev/null | sed 's/^/   | /' >&2 || true
}

# go_back FROM: the version before, on the stores as it knew them.
go_back() {
    local old="$switching_from" kept="$stores/before-$1"
    switching_from=""
    stop_service
    read -r _ _ kept 2>/dev/null <"$unfinished" || true
    if note_switch "$old" back "$kept" && bring_back "$old" "$kept" && start_service && becomes_ready "$old"; then
        rm -rf "${prefix:?}/versions/$1"
        return
    fi
    give_up "the version before, $old, does not become ready either" "journalctl -u edged says why." \
        "Stores from before the upgrade that are not back yet lie in $kept: run this again once the cause is mended."
}

# bring_back OLD KEPT: with the service stopped. The version first: until its stores are there again it refuses those of
# the newer one, which on the older stores would begin anew. Files are renamed alone, and each is only once: after a
# power cut it goes on where it was, and what the older version has made since is left alone.
bring_back() {
    local home="${2%/*}" store aside
    switch_to "$1" || return
    for store in "${store_names[@]}"; do
        [[ -e "$2/$store" || -e "$2/no-$store" ]] || continue
        as_edged find "$home" -maxdepth 1 -name "$store*" -exec mv --backup=numbered -t "$2/failed" {} + || return
        as_edged find "$2" -maxdepth 1 -name "$store-*" -exec mv -t "$home" {} + || return
        [[ ! -e "$2/$store" ]] || as_edged mv "$2/$store" "$home/" || return
    done
    if [[ -d "$2/failed" ]]; then
        aside="$home/failed-${2##*/before-}"
        [[ ! -e "$aside" ]] || aside+=".$(date +%s)"
        as_edged mv "$2/failed" "$aside" || return
        say "the stores are those from before the upgrade; what the new version made of them lies in $aside"
        sync --file-system "$home"
    fi
    end_switch "$2"
}

# Replaces install-edge.sh's: cut short between two versions, the one before serves.
undo() {
    local old phase kept
    remove_build
    if [[ -n "$switching_from" && "$switching_from" != "$(current_version)" ]]; then
        go_back "$(current_version)"
    elif [[ -n "$switching_from" ]]; then
        ! read -r old phase kept 2>/dev/null <"$unfinished" || [[ "$old $phase" != "$switching_from to" ]] ||
            end_switch "$kept" # nothing was switched yet
        switch_to "$switching_from" # its units too
        start_service
    fi
    [[ -z "$scratch" ]] || rm -rf "$scratch"
    rmdir "$prefix" 2>/dev/null || true # where nothing was installed
}

# Only the one that serves and the one before are kept.
forget_old_versions() {
    local directory kept
    kept=" $(current_version) $(basename "$(readlink "$prefix/previous" 2>/dev/null || true)") "
    for directory in "$prefix"/versions/*; do
        [[ "$kept" == *" ${directory##*/} "* ]] || rm -rf "$directory"
    done
}

# --- the command ----------------------------------------------------------------------------------------------

# For root it runs as the service's user, in whose directories files of root's would be in the way; but what reads or
# writes files where root has them, and nothing of the service's, is root.
make_command() {
    if [[ -e "$command_path" ]] && ! grep -qsF "$wrapper_mark" "$command_path"; then
        say "$command_path is somebody else's and was left alone: the command is $prefix/current/bin/edged"
        return
    fi
    place "$command_path" root:root 755 <<COMMAND
#!/bin/sh
$wrapper_mark
: "\${EDGED_CONFIG:=$config_file}"
export EDGED_CONFIG
case "\${1:-} \${2:-}" in
    "docs "* | "profile "* | "models activate") ;;
    *) [ "\$(id -u)" != 0 ] ||
        exec setpriv --reuid $service_user --regid $service_user --init-groups $prefix/current/bin/edged "\$@" ;;
esac
exec $prefix/current/bin/edged "\$@"
COMMAND
}

# --- all of it ------------------------------------------------------------------------------------------------

install_service() {
    local version
    settle_places
    step "Check this machine"
    check_service
    version="$(wanted_version)"
    if [[ "$dry_run" == yes ]]; then
        say_plan "$version"
        return
    fi
    prepare_service
    settle_switch "$version"
    if serves "$version" && { [[ "$broker" != local ]] || broker_is_whole; }; then
        keep_key
        make_command # and this: a run before may have been cut short after the start
        forget_old_versions
        say "$version is installed and serves"
        end_step
        return
    fi
    step "User, configuration, key"
    make_user
    [[ "$broker" != local ]] || install_broker
    make_config
    [[ -e "$device_key" ]] || keep_key # now: where it never becomes ready, the device keeps to the key all the same
    step "Version $version"
    make_version "$version"
    step "Models"
    pull_service_models "$version"
    step "Check with the new version, on copies of the data"
    rehearse "$version"
    step "Start"
    serve_version "$version"
    keep_key
    make_command
    forget_old_versions
    reach_disk
    end_step
    say_how_to_use
}

settle_places() {
    local installed
    umask 022 # the service reads what root makes here; secrets have modes of their own
    PATH="$PATH:/usr/sbin:/sbin"
    installed="$(installed_prefix)"
    prefix="$(realpath -m -- "${prefix:-${installed:-/opt/edged}}")"
    [[ "$prefix" =~ ^/[A-Za-z0-9._/-]+$ ]] || wrong_use "--prefix $prefix: systemd's units take letters, digits and . _ - / there"
    [[ -z "$installed" || "$prefix" == "$(realpath -m -- "$installed")" ]] ||
        give_up "edged is installed in $installed" "Nothing was changed. Leave --prefix out, or remove that one first: --uninstall"
    state="$prefix/install" # this script's own: lock and logs
    unfinished="$state/switching"
    export EDGED_CACHE="${EDGED_CACHE:-$prefix/cache}"
}

# Where the service that is there runs from; nothing where none is.
installed_prefix() {
    sed -n 's|^ExecStart=\(/.*\)/current/bin/edged serve$|\1|p' "$unit_dir/edged.service" 2>/dev/null || true
}

what_is_left() {
    printf 'The service, its configuration, models and data were left as they were.\n'
}

say_plan() {
    say_what_is_missing
    say "would install version $1 to $prefix, beside $(current_version | grep . || printf 'nothing')"
    getent passwd "$service_user" >/dev/null || say "would make the user $service_user, $config_dir, $data_dir and $cache_dir"
    [[ "$broker" != local ]] || say "would make mosquitto listen on port 1883, with $broker_config"
    is_whole "$1" || [[ -n "$unpacked" ]] || cached_wheel >/dev/null || say "would compile llama.cpp with: $(llama_flags | tr '\n' ' ')"
    [[ -z "$key" ]] || say "would keep the key as $device_key"
    say "would try configuration and copies of the data, then start it; nothing was changed"
    end_step
}

say_how_to_use() {
    local sentence sudo=""
    ! command -v sudo >/dev/null || sudo="sudo "
    printf '\nedged serves. See how it is, and ask it something:\n\n  systemctl status edged\n'
    printf '  %sedged status\n  %sedged docs add FILE.md\n  %sedged ask "…"\n' "$sudo" "$sudo" "$sudo"
    printf '\nMembers of the group %s may use it too: %susermod -aG %s NAME\n' "$service_user" "$sudo" "$service_user"
    if [[ "$broker" == local ]]; then
        printf '\nSensors log in to port 1883 as "sensor", with the password in %s; who is to read\n' "$config_dir/sensor-password"
        printf 'all answers logs in as "monitor", with the one in %s.\n' "$config_dir/monitor-password"
    fi
    while IFS= read -r sentence; do printf '\nNote: %s.\n' "$sentence"; done < <(board_advice)
}

# --- removing it ------------------------------------------------------------------------------------------------

uninstall_service() {
    settle_places
    step "Remove edged"
    if [[ "$dry_run" == yes ]]; then
        say "would stop the service and remove its units, $command_path and $prefix"
        [[ "$purge" == no ]] || say "would remove $config_dir, $data_dir, $cache_dir, mosquitto's configuration for edged, the user $service_user"
        return
    fi
    [[ ! -e "$prefix" || -d "$prefix/versions" || -d "$state" ]] ||
        give_up "$prefix was not made by this script" "Nothing was changed. Name the --prefix of the installation."
    systemctl disable --quiet --now edged-probe.service edged.socket edged.service 2>/dev/null || true
    remove_program
    [[ "$purge" == no ]] || remove_data
    if [[ "$purge" == no ]]; then
        say "kept: $config_dir, $data_dir and $cache_dir; --uninstall --purge removes them too"
    fi
    end_step
}

remove_program() {
    local unit
    for unit in "${units[@]}"; do rm -f "$unit_dir/$unit"; done
    rm -f "$device_drop_in"
    rmdir "${device_drop_in%/*}" 2>/dev/null || true
    systemctl daemon-reload
    systemctl stop edged.slice 2>/dev/null || true
    systemctl reset-failed 'edged.*' 2>/dev/null || true
    ! grep -qsF "$wrapper_mark" "$command_path" || rm -f "$command_path"
    rm -rf "$prefix"/{versions,current,previous,install,cache} "$prefix"/.edged-install.*
    rmdir "$prefix" 2>/dev/null || true
}

remove_data() {
    remove_broker_config
    remove_directory "$config_dir"
    remove_directory "$data_dir"
    remove_directory "$cache_dir"
    ! getent passwd "$probe_user" >/dev/null || userdel "$probe_user"
    ! getent passwd "$service_user" >/dev/null || userdel "$service_user"
    ! getent group "$service_user" >/dev/null || groupdel "$service_user" # it stays where it has other members
    say "removed: $config_dir, $data_dir, $cache_dir, the user $service_user"
}

# A mount is emptied.
remove_directory() {
    if mountpoint -q "$1"; then
        find "$1" -mindepth 1 -delete
        say "$1 is a mount: remove it from /etc/fstab"
    else
        rm -rf "$1"
    fi
}
