#!/bin/sh
# Installs what `chaos power` and `chaos disk` need on Debian or Ubuntu. Run as root.
set -eu
apt-get update -q
exec apt-get install -y -q --no-install-recommends qemu-utils e2fsprogs xfsprogs fuse3 mount
