# Runs on the host as mmdebstrap's last hook, with the new system at $1: gives it its last touch,
# and makes its disk. BV_DISK and BV_FILES are paths of open files, because an ordinary user's
# user namespace reaches no folder of that user.
set -eu
cd "$1"

chroot . systemctl -q enable systemd-networkd.service ssh.socket
# Nothing waits for the network at the start but what asks for it; there is no store of crashes;
# and a machine that lives for minutes needs no timers that refresh lists of packages.
chroot . systemctl -q disable ssh.service systemd-networkd-wait-online.service \
    systemd-pstore.service apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service
# The kernel that starts this system lies beside the disk; one that were upgraded in here would
# not start, but take the place of its modules.
chroot . apt-mark -q hold "$BV_KERNEL" >/dev/null

# What is each machine's own is made at its first start.
: >etc/machine-id
rm -f etc/ssh/ssh_host_* var/lib/dbus/machine-id
# What mmdebstrap left for itself.
rm -f etc/apt/apt.conf.d/99mmdebstrap etc/dpkg/dpkg.cfg.d/99mmdebstrap
rm -rf var/lib/apt/lists/* var/cache/apt/* var/cache/debconf/*-old var/log/* run/*

# To the kernel, its modules and busybox, from which the initramfs is made.
tar -cf "$BV_FILES" boot/vmlinuz-* bin/busybox etc/debian_version \
    $(ls lib/modules/*/modules.dep) \
    $(find lib/modules/*/kernel/drivers/virtio lib/modules/*/kernel/drivers/block \
        lib/modules/*/kernel/fs/fat lib/modules/*/kernel/fs/nls -name '*.ko*')

# A mount of the folder alone shows it without /proc, /sys and /dev, which are mounted in it. In
# /tmp lies the configuration of mmdebstrap's apt: without it that would be the host's apt, and
# change the host. So it is hidden and not removed.
exec unshare --mount --propagation private sh -euc '
    mount --bind . mnt
    mount -t tmpfs -o mode=1777 tmpfs mnt/tmp
    exec mke2fs -q -F -t ext4 -b 4096 -m 1 -L debian -U "$BV_UUID" \
        -E lazy_itable_init=0,lazy_journal_init=0 -d mnt "$BV_DISK" "$BV_KILOBYTES"k
'
