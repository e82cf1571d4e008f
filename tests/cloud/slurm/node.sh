#!/bin/bash
# node.sh NAME CHECKOUT LAB PYTHON...: makes this process the first of a node, in namespaces of its own.
# A node has its own /etc, /tmp, /run, /dev/shm and logs; /root is shared over the nodes, as a Slurm site's home is; LAB is at /srv.
set -eu
name=$1 checkout=$2 lab=$3
shift 3
hostname "$name"
mount --make-rprivate /
mount --bind "$lab" /srv
mount -t tmpfs tmpfs "$checkout" # what a node knows of the project, SkyPilot has brought it
own=/srv/nodes/$name
mkdir -p $own/{run/munge,run/sshd,tmp,spool/slurmctld,spool/slurmd,log/munge}
chmod 1777 $own/tmp
chown munge $own/run/munge $own/log/munge

mount -t tmpfs tmpfs /mnt
mkdir /mnt/{changed,work}
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/changed,workdir=/mnt/work /etc
rm -rf /etc/xdg/{pip,uv} # the machine's own sources of packages
cp -r /srv/etc/. /etc/

for python in "$@"; do # installations that the next mount would hide
  case $python in /root/*)
    mkdir -p "/srv/home/${python#/root/}"
    mount --bind "$python" "/srv/home/${python#/root/}" ;;
  esac
done
mount --rbind /srv/home /root
mount --bind /srv/bin /usr/local/bin
mount --bind $own/spool /var/spool
mount --bind $own/log /var/log
mount --bind $own/run /run
mount --bind $own/tmp /tmp
mount -t tmpfs -o size=4g tmpfs /dev/shm

cd /
setpriv --reuid=munge --regid=munge --clear-groups munged --key-file=/srv/keys/munge --seed-file=/run/munge/seed
if [ "$name" = c0 ]; then slurmctld; else slurmd -N "$name"; fi
exec /usr/sbin/sshd -D -e 2>/var/log/sshd.log
