#!/bin/busybox sh
# The first process of Bivisor's Debian guest: makes a system that a person can use of a kernel
# and a busybox, runs /etc/start, and powers off when that ends.
export PATH=/bin HOME=/root TERM=linux

/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
hostname bivisor
ip link set lo up
# Only errors of the kernel may interrupt what a person types; `dmesg` has the rest.
dmesg -n 4

# The power button: its first event (24 bytes on 64-bit Linux) powers off.
power_button() {
    for module in /lib/modules/*.ko; do
        [ -e "$module" ] && insmod "$module"
    done
    for name in /sys/class/input/event*/device/name; do
        [ "$(cat "$name" 2>/dev/null)" = 'Power Button' ] || continue
        event=${name#/sys/class/input/}
        head -c 24 "/dev/input/${event%%/*}" >/dev/null && poweroff
    done
}
power_button </dev/null &

# What busybox's poweroff, reboot and halt send to the first process.
trap 'poweroff -f' USR2
trap 'reboot -f' TERM
trap 'halt -f' USR1

cd /root
# A session of its own on the console, for Ctrl-C and job control. The second setsid finds itself
# a session's leader and goes to the background by itself; with `&` this shell would start it
# with Ctrl-C ignored.
setsid setsid cttyhack sh -c 'sh /etc/start; poweroff -f' </dev/console >/dev/console 2>&1

# Traps run while `wait` waits. If this ends, something killed all there was.
sleep 2147483647 &
wait $!
poweroff -f
