#!/bin/busybox sh
# The first process of an installed guest: loads what it takes to see the disk, mounts the root
# file system that the kernel's command line names, and hands over to its init.
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys

# Loads the modules of a list, in the order in which they need each other.
load() {
    while read -r module; do
        /bin/busybox insmod "/modules/$module"
    done <"/modules/$1"
}
load disk

root= options=rw init=/sbin/init
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in
    root=*) root=${word#root=} ;;
    init=*) init=${word#init=} ;;
    ro) options=ro ;;
    esac
done

device() {
    case $root in
    LABEL=* | UUID=*) /bin/busybox findfs "$root" 2>/dev/null ;;
    *) [ -b "$root" ] && echo "$root" ;;
    esac
}

# Disks appear a moment after their drivers are loaded.
tries=0
until disk=$(device); do
    tries=$((tries + 1))
    if [ $tries = 100 ]; then
        echo "There is no disk $root; a shell, to look for it:"
        exec /bin/busybox sh
    fi
    /bin/busybox usleep 50000
done

apply_seed() {
    if [ -e /seed/hostname ]; then
        /bin/busybox cat /seed/hostname >/root/etc/hostname
        read -r name </seed/hostname
        /bin/busybox sed -i "s/^127\.0\.1\.1 .*/127.0.1.1 $name/" /root/etc/hosts
    fi
    if [ -e /seed/keys ]; then
        keys=/root/root/.ssh/authorized_keys
        /bin/busybox mkdir -p -m 700 /root/root/.ssh
        while read -r key; do
            /bin/busybox grep -qxF -- "$key" "$keys" 2>/dev/null || echo "$key" >>"$keys"
        done </seed/keys
    fi
    if [ -e /seed/fstab ]; then
        /bin/busybox cat /seed/fstab >>/root/etc/fstab
    fi
}

/bin/busybox mount -t ext4 -o "$options" "$disk" /root || exec /bin/busybox sh

# What the host tells (the seed disk of `seed/mod.rs`). Its shared folders belong to this start
# and not to the disk, so those of the last start go.
if [ "$options" = rw ]; then
    if /bin/busybox grep -q ,x-bivisor /root/etc/fstab; then
        /bin/busybox sed -i '/,x-bivisor /d' /root/etc/fstab
    fi
    seed=$(/bin/busybox findfs LABEL=BIVISOR 2>/dev/null)
    if [ -n "$seed" ]; then
        load seed
        /bin/busybox mount -t vfat -o ro "$seed" /seed && apply_seed
        /bin/busybox umount /seed
    fi
fi

for folder in dev proc sys; do
    /bin/busybox mount --move "/$folder" "/root/$folder"
done
exec /bin/busybox switch_root /root "$init"
