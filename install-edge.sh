#!/usr/bin/env bash
# Installs edged. For the user who runs it, without root: its own Python environment, llama.cpp compiled for this
# processor, an API key and both default models. As root on a system with systemd: the service. Running it again repairs
# or upgrades, and takes seconds when all is there.
set -euo pipefail
export PYTHONSAFEPATH=1 # root's Python must not take modules from whatever directory this is called in

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)" # without links: an upgrade changes one on its way here
# shellcheck source=scripts/machine.sh
source "$here/scripts/machine.sh"
# shellcheck source=scripts/llama-wheel.sh
source "$here/scripts/llama-wheel.sh"

prefix=""
demo=no
broker=""
for_user=no
architecture=auto
mode=standalone
model=""
bundle=""
key=""
offline=no
dry_run=no
uninstall=no
purge=no
service_options=() # those given that only the service has

explained=no # whether the reason for a failure was told already

usage() {
    cat <<HELP
Usage: ./install-edge.sh [--demo] [--prefix DIR] [--broker URL]
       sudo ./install-edge.sh [OPTIONS]

Without root it installs edged for the user who runs it. As root, where systemd runs, it installs the service: a user
'edged', /etc/edged, /var/lib/edged, and one directory a version below /opt/edged. An upgrade keeps configuration and
data, and the old version comes back by itself when the new one does not become ready.

  --demo           afterwards show it at work: a sensor asks, edged answers from its manuals (without the service)
  --prefix DIR     where the program goes (default: \$EDGED_HOME, else ~/.local/share/edged; the service: /opt/edged)
  --broker URL     the MQTT broker to use, mqtt://HOST:PORT or mqtts://HOST:PORT
                   (default: the demo brings its own; the daemon looks at 127.0.0.1:1883)
  --user           as root, install for root alone and no service
  --help           this text

For the service:
  --broker local   install mosquitto on this device, open to the network, with a password for each sensor
  --model NAME     the chat model of a new installation (default: the bundle's, else edged's own)
  --bundle FILE    install from an offline bundle; nothing is taken from the network
  --key FILE       install it only if it is signed by this public key (PEM), which the device keeps: from then on it
                   refuses bundles that the key did not sign
  --offline        take nothing from the network, as with --bundle: what is missing is named, and without a bundle this
                   version must be installed already
  --arch NAME      amd64, arm64 or auto: refuse to install on another (default: auto)
  --mode NAME      standalone, the only one there is yet
  --dry-run        check this machine, say what would be done, change nothing
  --uninstall      remove the service and the program; configuration, models and data stay
  --purge          with --uninstall: remove these too, and the user 'edged'

Without a bundle the first run compiles llama.cpp for this processor: minutes on a fast machine, up to an hour on a
small board. The result and the models are kept in \$EDGED_CACHE (default: ~/.cache/edged; the service: below its
prefix), and later runs take them from there.
HELP
}

# --- options ------------------------------------------------------------------------------------------

parse_options() {
    while (($#)); do
        case "$1" in
            --demo) demo=yes ;;
            --user) for_user=yes ;;
            --help | -h) usage && exit 0 ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
            --prefix) take prefix "$@" && shift ;;
            --broker) take broker "$@" && shift ;;
            --arch) take architecture "$@" && only_for_service "$1" && shift ;;
            --mode) take mode "$@" && only_for_service "$1" && shift ;;
            --model) take model "$@" && only_for_service "$1" && shift ;;
            --bundle) take bundle "$@" && only_for_service "$1" && shift ;;
            --key) take key "$@" && only_for_service "$1" && shift ;;
            --offline) offline=yes && only_for_service "$1" ;;
            --dry-run) dry_run=yes && only_for_service "$1" ;;
            --uninstall) uninstall=yes && only_for_service "$1" ;;
            --purge) purge=yes && only_for_service "$1" ;;
            *) wrong_use "there is no option '$1'" ;;
        esac
        shift
    done
    check_options
}

# take VARIABLE OPTION [VALUE…]
take() {
    [[ -n "${3:-}" ]] || wrong_use "$2 needs a value"
    printf -v "$1" '%s' "$3"
}

only_for_service() {
    service_options+=("$1")
}

check_options() {
    [[ "$broker" != local ]] || only_for_service "--broker local"
    [[ -z "$broker" || "$broker" == local || "$broker" =~ ^mqtts?://[^\"\\[:space:]]+$ ]] ||
        wrong_use "'$broker' is no broker's URL such as mqtt://host:1883"
    [[ "$architecture" =~ ^(auto|amd64|arm64)$ ]] || wrong_use "there is no architecture '$architecture'"
    [[ "$mode" =~ ^(standalone|cluster)$ ]] || wrong_use "there is no mode '$mode'"
    [[ -z "$model" || "$model" =~ ^[a-z0-9][a-z0-9._-]*$ ]] || wrong_use "'$model' is no model's name"
    [[ "$purge" == no || "$uninstall" == yes ]] || wrong_use "--purge goes with --uninstall"
    [[ -z "$key" || -n "$bundle" ]] || wrong_use "--key goes with --bundle"
    [[ "$mode" == standalone ]] ||
        give_up "edged does not form clusters yet" "Nothing was changed. Each device serves by itself: --mode standalone."
    installs_service || ((${#service_options[@]} == 0)) ||
        wrong_use "${service_options[0]} is for the service: run this as root, where systemd runs, without --demo and --user"
    [[ "$uninstall" == yes || -n "$bundle" || -d "$here/edged" ]] ||
        give_up "this installer came with a bundle, without edged's source" "Nothing was changed. Name a bundle: --bundle FILE"
}

installs_service() {
    [[ "$(id -u)" == 0 && -d /run/systemd/system && "$demo" == no && "$for_user" == no ]]
}

wrong_use() {
    complain "$1" "./install-edge.sh --help lists the options."
    exit 2
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
    give_up "" "$(what_is_left)" \
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

# What the kind of installation has to undo, when it is cut short.
undo() {
    remove_build
}

# Nothing cuts it short: not a second Ctrl-C, nor that nobody reads what it says any more.
on_exit() {
    local status=$?
    trap '' INT TERM HUP PIPE
    set +e
    undo
    if ((status != 0 && status != 2)) && [[ "$explained" == no ]]; then
        complain "failed at '${current_step:-the start}' (status $status)" "Run this again: it goes on from here."
    fi
}

on_interrupt() {
    explained=yes
    complain "stopped at '${current_step:-the start}'" "Nothing half-made is in use. Run this again: it goes on from here." ||
        true # whoever hung up cannot read it
    exit 130
}

main() {
    parse_options "$@"
    trap on_exit EXIT
    trap on_interrupt INT TERM HUP
    if installs_service; then
        # shellcheck source=scripts/service.sh
        source "$here/scripts/service.sh"
        if [[ "$uninstall" == yes ]]; then uninstall_service; else install_service; fi
    else
        # shellcheck source=scripts/user.sh
        source "$here/scripts/user.sh"
        install_for_user
    fi
}

[[ "${BASH_SOURCE[0]}" != "$0" ]] || main "$@" # tests source this
