#!/bin/sh
# Installs the Debian packages that tests need and that are missing, where that is possible: as root, with apt-get.
# Elsewhere it names them and goes on; the tests that need them say so themselves.
set -eu
command -v dpkg-query >/dev/null || exit 0
missing=
for package in $(sed 's/#.*//' "$(dirname "$0")/debian-packages.txt"); do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests would like these Debian packages:$missing" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # a list of names
apt-get install -y -qq --no-install-recommends $missing || {
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends $missing
}
