# One round of mixed work, by name; prints one line that depends on nothing but the name: the same
# in a guest as on the host. In PATH: busybox's applets, tcc and bench. Works in a folder of its own.
set -e
case $1 in
compile) # A C compiler over generated code of a thousand functions.
    awk 'BEGIN {
        print "typedef unsigned long u;"
        for (i = 0; i < 1000; i++)
            printf "u f%d(u x) { u t[%d]; int n; for (n = 0; n < %d; n++) t[n] = x * %d + n; if (x %% %d) return t[x %% %d] ^ (x >> %d); return %s; }\n",
                i, i % 7 + 1, i % 7 + 1, i * 31 + 7, i % 5 + 2, i % 7 + 1, i % 13 + 1, i ? "f" (i - 1) "(x / 2)" : "x"
    }' >code.c
    tcc -c code.c -o code.o
    sha256sum <code.o
    ;;
compress) # Both ways, with a hash of either end.
    seq 1 400000 | awk '{ print $1 * $1 % 9973, "the quick brown fox" }' >text
    gzip -c text >text.gz
    gunzip -c text.gz | cmp - text
    sha256sum <text.gz
    ;;
fork) # Pipelines and subshells: a thousand processes.
    n=0 sum=0
    while [ $n -lt 200 ]; do
        sum=$((sum + $(echo $n | sed 's/$/7/' | rev | tr 0-9 1-90)))
        n=$((n + 1))
    done
    echo "$sum"
    ;;
signal) # Children that are signalled, trapped and waited for.
    caught=0
    trap 'caught=$((caught + 1))' USR1
    n=0
    while [ $n -lt 200 ]; do
        kill -USR1 $$
        (trap 'exit 7' TERM; kill -TERM "$(sh -c 'echo $PPID')"; exit 1) || caught=$((caught + $?))
        n=$((n + 1))
    done
    echo "$caught"
    ;;
*) # A row of the benchmark kit: its checksum.
    bench "$1" 0.05 | awk '/^BENCH/ { print $4 }'
    ;;
esac
