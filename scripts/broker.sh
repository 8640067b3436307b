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
    make_secret "$config_dir/mqtt-password" "root:$service_user" 640
    make_secret "$config_dir/sensor-password" root:root 600
    [[ -s "$broker_passwords" ]] || write_broker_passwords
    place "$broker_acl" root:mosquitto 640 <<'ACL'
# edged itself takes every question and may answer on whatever topic a sensor names.
user edged
topic readwrite #

# Each sensor has a name of its own: it writes below sensors/NAME, asks at edged/query, and reads its answers by giving
# a response topic below edged/answer/NAME. It cannot read another's values, questions or answers.
pattern write sensors/%u/#
pattern write edged/query
pattern read edged/answer/%u/#
pattern read edged/status
ACL
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

# mosquitto_passwd hashes a file in place; by its arguments a password could be seen in the process list.
write_broker_passwords() {
    {
        printf 'edged:%s\n' "$(<"$config_dir/mqtt-password")"
        printf 'sensor:%s\n' "$(<"$config_dir/sensor-password")"
    } | place "$broker_passwords" root:root 600
    mosquitto_passwd -U "$broker_passwords"
    chown root:mosquitto "$broker_passwords"
    chmod 640 "$broker_passwords"
}

remove_broker_config() {
    [[ -e "$broker_config" ]] || return 0
    rm -f "$broker_config" "$broker_passwords" "$broker_acl"
    ! systemctl is-active --quiet mosquitto.service || systemctl restart mosquitto.service || true
}
