# What needs a machine of its own: processors, file systems, users, namespaces, the network.
# Prints only what must be.
echo "system: $(uname -sm), $(nproc) CPUs, $(grep -c ^processor /proc/cpuinfo) known"

# Each CPU runs what is sent to it: field 39 of the status is where a process runs (proc(5)).
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    number=${cpu##*cpu}
    mask=$(printf %x $((1 << number)))
    echo "CPU $number ran on $(taskset "$mask" cut -d' ' -f39 /proc/self/stat)"
done
# All but the first go and come again.
for cpu in /sys/devices/system/cpu/cpu[1-9]*; do
    [ -e "$cpu/online" ] || continue
    echo 0 >"$cpu/online"
    left=$(nproc)
    echo 1 >"$cpu/online"
    echo "CPU ${cpu##*cpu} went, $left left, and came: $(nproc)"
done

mkdir small
mount -t tmpfs -o size=1m small small
dd if=/dev/zero of=small/full bs=64k 2>/dev/null && echo 'a full file system took more'
echo "full: $(stat -c %s small/full) bytes, $(du -k small/full | cut -f1) KiB"
truncate -s 64k small/full
truncate -s 512k small/sparse
echo "sparse: $(du -k small/sparse | cut -f1) KiB, all $(du -sk small | cut -f1) KiB"
umount small
ls small

echo 'user:x:1000:1000::/:/bin/sh' >>/etc/passwd
echo 'not for users' >secret
chmod 600 secret
su user -c 'id -u; cat secret 2>/dev/null || echo "secret: refused"'
chown user secret
su user -c 'cat secret'
unshare -f -p sh -c 'echo "first of its namespace: $$"'
ping -c 3 -q -A 127.0.0.1 | grep -o '3 packets received'
grep -q '^nodev.tmpfs$' /proc/filesystems && echo 'tmpfs is known'
