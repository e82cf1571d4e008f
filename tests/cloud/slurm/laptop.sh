#!/bin/bash
# laptop.sh CHECKOUT LAB: makes this process the laptop's first, with a bridge to which the nodes are wired, and nothing beyond it.
# Everything of the cloud, the nodes included, lives in this PID namespace: when this process ends, the kernel ends all of it.
set -eu
checkout=$1 lab=$2
mount --make-rprivate /
mount --rbind "$checkout" /mnt
mount --bind "$lab/laptop/tmp" /tmp
mkdir -p "$checkout" # when it lay in /tmp
mount --move /mnt "$checkout"
mount -t tmpfs tmpfs /run
ip link set lo up
ip addr add 8.8.8.8/32 dev lo # internet.py
ip link add br0 type bridge
ip addr add 10.77.0.254/24 dev br0
ip link set br0 up
trap '' CHLD # orphans are reaped
echo ready
exec sleep infinity
