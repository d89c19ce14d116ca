#!/usr/bin/env bash
# The two commands of the README in a fresh Debian 12 tree: mmdebstrap, then chroot. As root.
#     tests/bare.sh
# Takes over from this machine only how to reach the package servers: resolver, proxy, certificates.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "bare.sh: needs root, for chroot and mounts" >&2; exit 2; }
command -v mmdebstrap >/dev/null || apt-get install -q -y --no-install-recommends mmdebstrap >/dev/null

tree=$(mktemp -d /var/tmp/casemate-bare-XXXXXX)
trap 'rm -rf --one-file-system "$tree"' EXIT
echo "== a fresh Debian 12 in $tree"
mmdebstrap --quiet --variant=minbase --include=git,ca-certificates bookworm "$tree"
git clone -q --no-hardlinks . "$tree/root/casemate"
commit=$(git -C "$tree/root/casemate" rev-parse --short HEAD)
cp -L /etc/resolv.conf "$tree/etc/resolv.conf"
cp /etc/hosts "$tree/etc/hosts"
cp /etc/ssl/certs/ca-certificates.crt "$tree/etc/ssl/certs/ca-certificates.crt"

environment=(PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8)
for name in http_proxy https_proxy no_proxy PIP_INDEX_URL PIP_CERT PIP_DEFAULT_TIMEOUT; do
    [ -z "${!name:-}" ] || environment+=("$name=${!name}")
done

# A mount namespace of its own: nothing stays mounted, whatever happens.
unshare --mount --propagation private bash -s "$tree" "${environment[@]}" <<'INSIDE'
set -euo pipefail
tree=$1
shift
mount -t proc proc "$tree/proc"
mount --rbind /sys "$tree/sys"
mount --rbind /dev "$tree/dev"
mount -t tmpfs tmpfs "$tree/run"
env -i "$@" chroot "$tree" bash -euc '
    cd /root/casemate
    for command in demo demo test; do
        echo "== ./run $command"
        started=$SECONDS
        ./run $command </dev/null
        echo "== ./run $command took $((SECONDS - started)) s"
    done'
INSIDE
echo "== passed in a fresh tree at $commit"
