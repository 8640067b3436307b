# shellcheck shell=bash
# mosquitto as the broker of this device: --broker local. Sourced by service.sh, never run.
#
# One file in conf.d and two beside it, all removed by --uninstall --purge. What is in the broker's care while edged is
# away survives a power cut but for the last seconds: docs/OPERATIONS.md.

: "${config_dir:?} ${config_file:?} ${service_user:?} ${root?}" # service.sh sets them

readonly mosquitto_dir="$root/etc/mosquitto"
readonly broker_config="$mosquitto_dir/conf.d/edged.conf"
readonly broker_passwords="$mosquitto_dir/edged.passwd"
readonly broker_acl="$mosquitto_dir/edged.acl"

# Nothing is changed where the broker serves somebody already.
check_broker() {
    local other
    other="$(grep -lsE '^[[:space:]]*(listener|port)[[:space:]]' "$mosquitto_dir/mosquitto.conf" "$mosquitto_dir"/conf.d/*.conf |
        grep -vxF "$broker_config" | head -n 1)" || true
    [[ -z "$other" ]] ||
        give_up "mosquitto has listeners of its own in $other, and --broker local would put passwords before them" \
            "Nothing was changed. Use that broker: --broker mqtt://127.0.0.1:1883, with mqtt.username in $config_file."
}

install_broker() {
    admit edged "$config_dir/mqtt-password" "root:$service_user" 640
    admit sensor "$config_dir/sensor-password" root:root 600
    admit monitor "$config_dir/monitor-password" root:root 600
    place_acl
    place "$broker_config" root:root 644 <<CONFIG
# Made by install-edge.sh for edged; made again by each run.
listener 1883
allow_anonymous false
password_file $broker_passwords
acl_file $broker_acl

# What waits for edged is written to the disk every 10 seconds: so much of it a power cut can take.
persistence true
autosave_interval 10
max_queued_messages 100000
max_queued_bytes 67108864
max_inflight_messages 64
max_packet_size 1048576
persistent_client_expiration 30d
CONFIG
    systemctl enable --quiet mosquitto.service
    systemctl restart mosquitto.service && systemctl is-active --quiet mosquitto.service && return
    rm -f "$broker_config"
    systemctl restart mosquitto.service || true
    give_up "mosquitto does not start with $broker_config, which was removed again" \
        "journalctl -u mosquitto says why. edged itself was left as it was."
}

# All that install_broker makes is there.
broker_is_whole() {
    local name
    [[ -e "$broker_config" && -s "$broker_acl" ]] || return
    for name in mqtt sensor monitor; do [[ -s "$config_dir/$name-password" ]] || return; done
    for name in edged sensor monitor; do grep -qs "^$name:" "$broker_passwords" || return; done
}

# admit NAME PASSWORD_FILE OWNER:GROUP MODE: once, or anew where the password is lost. mosquitto_passwd hashes a file in
# place; by its arguments a password could be seen in the process list.
admit() {
    local one="$broker_passwords.one"
    if [[ -s "$2" ]]; then
        ! grep -qs "^$1:" "$broker_passwords" || return 0
    else
        all_but "$1" | place "$broker_passwords" root:mosquitto 640
        make_secret "$2" "$3" "$4"
    fi
    printf '%s:%s\n' "$1" "$(<"$2")" | place "$one" root:root 600
    mosquitto_passwd -U "$one"
    { all_but "$1" && cat "$one"; } | place "$broker_passwords" root:mosquitto 640
    rm -f "$one"
}

all_but() {
    grep -sv "^$1:" "$broker_passwords" || true
}

# Somebody else's rules stay.
place_acl() {
    if [[ -s "$broker_acl" && "$(<"$broker_acl")" != "$(acl_text)" ]]; then
        say "kept: $broker_acl, which is not as this version makes it; for that one remove it and run this again"
        return
    fi
    acl_text | place "$broker_acl" root:mosquitto 640
}

acl_text() {
    cat <<'ACL'
# Made by install-edge.sh for edged; once it was changed it is left alone.

# edged itself takes every question and may answer on whatever topic a sensor names.
user edged
topic readwrite #

# For people and programs of the operator's: reads all questions and answers, status and profile.
user monitor
topic read edged/#

# Each sensor has a name of its own: it writes below sensors/NAME, asks at edged/query, and reads its answers by giving
# a response topic below edged/answer/NAME. It cannot read another's values, questions or answers.
pattern write sensors/%u/#
pattern write edged/query
pattern read edged/answer/%u/#
pattern read edged/status
ACL
}

remove_broker_config() {
    rm -f "$broker_passwords" "$broker_acl"
    [[ -e "$broker_config" ]] || return 0
    rm -f "$broker_config"
    ! systemctl is-active --quiet mosquitto.service || systemctl restart mosquitto.service || true
}
