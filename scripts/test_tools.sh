#!/usr/bin/env bash
# Installs what some tests drive and no Python package brings: a browser and a Prometheus. Debian and
# its like, as root. Without them those tests are skipped, and say so.
set -euo pipefail

declare -A package=([chromium]=chromium [prometheus]=prometheus)
missing=()
for command in "${!package[@]}"; do
    command -v "$command" >/dev/null || missing+=("${package[$command]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${missing[@]}" fonts-dejavu-core >/dev/null
# Debian starts a Prometheus that nobody here asked for.
if [ -d /run/systemd/system ] && [[ " ${missing[*]} " == *" prometheus "* ]]; then
    systemctl disable --quiet --now prometheus
fi
