# What the shell and its programs do, in an empty folder, with a busybox and `exercise` in PATH.
# It prints only what must be: the same in a guest as on the host.
umask 022
ulimit -c 0

echo '== pipelines'
seq 1 2000 | awk '{ sum += $1 * $1 } END { print "squares", sum }'
seq 1 500 | sed -n 's/7$/& seven/p' | sort -r | head -n 5
printf 'b 2\na 10\nc 1\na 9\n' | sort -k1,1 -k2,2n | uniq -c -w1 2>/dev/null | tr -s ' '
seq 1 300 | xargs -n 7 echo | cut -d' ' -f2- | tail -n 2
yes | head -n 3000 | wc -c
false | true; echo "last of a pipeline: $?"
seq 5 | while read -r n; do echo "$n*$n=$((n * n))"; done | paste -s -d ' ' -
echo hello | tr a-z A-Z | rev | cat | cat | cat | cat | cat | cat | cat | cat

echo '== here-documents'
name=Bivisor
cat <<END
expanded: $name $((6 * 7)) $(echo inner)
END
cat <<'END'
literal: $name $((6 * 7))
END
cat <<-END | tr ' ' _
	without its tab
	END

echo '== jobs'
for n in 1 2 3 4 5 6; do (exit "$n") & eval "job$n=\$!"; done
for n in 6 1 5 2 4 3; do eval "wait \$job$n"; echo "job $n: $?"; done
for n in 1 2 3 4; do seq 1 "${n}000" | md5sum >"job.$n" & done
wait
cat job.1 job.2 job.3 job.4
mkfifo fifo
(for n in 1 2 3; do echo "through a fifo $n"; done) >fifo &
cat fifo
wait

echo '== signals'
trap 'echo trapped USR1' USR1
kill -USR1 $$
echo 'after the trap'
(trap 'echo "child got TERM"; exit 42' TERM; echo ready >ready; while :; do sleep 0.01; done) &
child=$!
while [ ! -s ready ]; do sleep 0.01; done
kill -TERM "$child"
wait "$child"
echo "child: $?"
for signal in ABRT ALRM KILL SEGV TERM USR2; do
    sh -c "kill -$signal \$\$; echo survived"
    echo "$signal: $?"
done 2>/dev/null
sh -c 'trap "" TERM; kill -TERM $$; echo "TERM was ignored"'
sh -c 'trap "echo the trap of EXIT" EXIT; exit 3'
echo "status: $?"
sleep 1000 & sleeper=$!
kill -STOP "$sleeper"
kill -CONT "$sleeper"
kill -KILL "$sleeper"
wait "$sleeper" 2>/dev/null
echo "sleeper: $?"
# The writer of a pipe without a reader dies of SIGPIPE.
(sh -c 'yes 2>/dev/null'; echo "writer: $?" >writer) | head -n 1
while [ ! -s writer ]; do sleep 0.01; done
cat writer
trap - USR1

echo '== files'
mkdir -p files/a/b
cd files
for n in 1 2 3; do echo "content $n" >"a/f$n"; done
mv a/f1 a/b/moved
ln -s ../f2 a/b/soft
ln a/f3 a/b/hard
chmod 751 a/f2
chmod u=r,go= a/b/moved
stat -c '%n %a %s %h %F' a/f2 a/f3 a/b/moved a/b/soft
cat a/b/soft a/b/hard
find . | sort
cp -r a copy
rm -r a/b
[ -e a/b ] || echo 'a/b is gone'
diff -r a copy | sort
ls copy copy/b
truncate -s 100000 sparse
echo end >>sparse
stat -c '%s' sparse
tail -c 4 sparse
cd ..
rm -r files
(echo 'no such command'; no-such-command) 2>/dev/null
echo "missing: $?"

echo '== data'
awk 'BEGIN { for (i = 0; i < 20000; i++) { x = (x * 1103 + 12345) % 65536; print x, i } }' >data
wc data
md5sum data
sha1sum data
sha256sum data
sha512sum data
cksum data 2>/dev/null || crc32 data
sort -n data | md5sum
sort -k2,2r data | md5sum
awk '{ count[$1 % 10]++ } END { for (i = 0; i < 10; i++) printf "%d:%d ", i, count[i]; print "" }' data
awk 'BEGIN { printf "%.12f %e %d %s\n", 22 / 7, 1 / 3, 2 ^ 40, substr("floating", 3, 4) }'
sed -e 's/\([0-9]\)\([0-9]\)/\2\1/g' -e '/^1/d' data | sha256sum
gzip -c data >data.gz
gunzip -c data.gz | cmp - data && echo 'gzip: the same'
bzip2 -c data | bzcat | cmp - data && echo 'bzip2: the same'
tar cf data.tar data job.1 job.2
tar tf data.tar
tar xOf data.tar job.1 | cmp - job.1 && echo 'tar: the same'
base64 data | md5sum
dd if=data of=part bs=1000 skip=7 count=50 2>/dev/null
dd if=part of=part bs=1 seek=100 count=20 conv=notrunc 2>/dev/null
md5sum part
dd if=/dev/zero bs=64k count=64 2>/dev/null | sha256sum
grep -c '99' data
cut -d' ' -f1 data | sort -n | uniq -d | wc -l
od -A x -t x1 part | head -n 2
printf '2^200\n3^100 %% 1000007\n' | bc

echo '== exercise'
exercise
echo "exercise: $?"
