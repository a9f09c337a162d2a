#!/usr/bin/env python3
"""A long mixed load in a guest: compiling, compressing, forking, signals, rewritten code, all at
once. Every round must give the result that it gives on the host, and the process must not grow.

  ./fetch-kernel.sh && ./make-initrd.sh         # once
  ./soak.py --minutes 60 --bv ../target/release/bv --cpus 2
"""
import argparse, os, re, shutil, subprocess, sys, tempfile, threading, time
HERE = os.path.dirname(os.path.abspath(__file__))
ROUNDS = ['compile', 'compress', 'fork', 'signal', 'gzip', 'sig_deliver', 'smp_mutex', 'proc_forkexec',
          'jit_cold', 'ipc_pipe', 'mm_fault', 'smc_patch', 'fp_nbody', 'smp_atomic']

def fetch_tcc(folder):
    subprocess.run(['apt-get', 'download', 'tcc'], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    package = next(f for f in os.listdir(folder) if f.startswith('tcc_'))
    subprocess.run(['dpkg', '-x', package, 'x'], cwd=folder, check=True)
    return os.path.join(folder, 'x/usr/bin/tcc')

def libraries(program):
    text = subprocess.run(['ldd', program], check=True, capture_output=True, text=True).stdout
    return re.findall(r'(/\S+)', text)

class Archive:
    """A newc archive."""
    def __init__(self): self.bytes, self.inode, self.folders = bytearray(), 1, set()
    def entry(self, name, mode, data=b''):
        name = name.encode() + b'\0'
        words = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 5, 1, len(name), 0)
        self.inode += 1
        head = ('070701' + ''.join('%08X' % word for word in words)).encode() + name
        self.bytes += head + b'\0' * (-len(head) % 4) + data + b'\0' * (-len(data) % 4)
    def file(self, name, source):
        parts = name.split('/')[:-1]
        for n in range(1, len(parts) + 1):
            folder = '/'.join(parts[:n])
            if folder not in self.folders:
                self.folders.add(folder)
                self.entry(folder, 0o40755)
        self.entry(name, 0o100755, open(source, 'rb').read())

def build(folder, tcc):
    archive = Archive()
    archive.file('init', HERE + '/soak-init')
    for name in ('busybox', 'bench'): archive.file('bin/' + name, f'{HERE}/{name}')
    archive.file('bin/tcc', tcc)
    archive.file('bin/soak-work.sh', HERE + '/soak-work.sh')
    for library in libraries(tcc): archive.file(library.lstrip('/'), library)
    archive.entry('dev', 0o40755)
    archive.entry('dev/console', 0o20600)
    archive.inode = 0
    archive.entry('TRAILER!!!', 0)
    path = folder + '/soak.cpio'
    open(path, 'wb').write(archive.bytes)
    return path

def on_the_host(folder, tcc):
    """What each round gives on the host."""
    applets = folder + '/bin'
    os.mkdir(applets)
    subprocess.run([HERE + '/busybox', '--install', '-s', applets], check=True)
    for name, source in (('tcc', tcc), ('bench', HERE + '/bench')): os.symlink(source, f'{applets}/{name}')
    expected = {}
    for name in ROUNDS:
        work = tempfile.mkdtemp(dir=folder)
        run = subprocess.run([applets + '/sh', HERE + '/soak-work.sh', name], cwd=work, check=True,
                             env={'PATH': applets, 'BB': HERE + '/busybox'}, capture_output=True, text=True)
        expected[name] = run.stdout.strip()
        assert expected[name], f'{name} gives nothing on the host: {run.stderr}'
        shutil.rmtree(work)
    return expected

def resident(pid, memory):
    """MiB of the process: the guest's memory (the mapping that is as large), and all beside it."""
    guest = own = 0
    try:
        for line in open(f'/proc/{pid}/smaps'):
            bounds = re.match(r'([0-9a-f]+)-([0-9a-f]+) ', line)
            if bounds: is_guest = int(bounds[2], 16) - int(bounds[1], 16) >= memory * 3 // 4 and len(line.split()) == 5
            elif line.startswith('Rss:') and is_guest: guest += int(line.split()[1])
            elif line.startswith('Rss:'): own += int(line.split()[1])
    except OSError: return None
    return (guest // 1024, own // 1024) if own else None

def thirds(sizes):
    """The most in each third of the time."""
    third = max(1, len(sizes) // 3)
    return [max(part or [0]) for part in (sizes[:third], sizes[third:2 * third], sizes[2 * third:])]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=int, default=60)
    parser.add_argument('--bv', default=HERE + '/../target/release/bv')
    parser.add_argument('--cpus', type=int, default=2)
    parser.add_argument('--memory', type=int, default=512, help='MiB of the guest')
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        tcc = fetch_tcc(folder)
        expected = on_the_host(folder, tcc)
        initrd = build(folder, tcc)
        command = [a.bv, 'run', '--kernel', HERE + '/vmlinuz', '--initrd', initrd, '--memory', f'{a.memory}MiB',
                   '--cpus', str(a.cpus), '--no-reboot', '--cmdline', f'console=ttyS0 quiet soak.minutes={a.minutes}']
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors='replace')
        sizes, over = [], threading.Event()
        def watch():
            while not over.wait(2):
                size = resident(process.pid, a.memory << 20)
                if size: sizes.append(size)
        watcher = threading.Thread(target=watch); watcher.start()
        counts, wrong, ended, start = dict.fromkeys(ROUNDS, 0), [], False, time.monotonic()
        for line in process.stdout:
            line = line.strip()
            words = line.split(' ', 2)
            if words[0] == 'SOAK-END': ended = True
            elif words[0] == 'SOAK' and len(words) == 3 and words[1] in counts:
                counts[words[1]] += 1
                if words[2] != expected[words[1]]: wrong.append(line)
            # The kernel's last words are no error; all others at this level are.
            elif line and 'reboot: Power down' not in line: wrong.append(line)
        status = process.wait(); over.set(); watcher.join()
    guest, own = thirds([size[0] for size in sizes]), thirds([size[1] for size in sizes])
    print(f'{time.monotonic() - start:.0f} s, {a.cpus} vCPUs, {sum(counts.values())} rounds: {counts}')
    print(f'resident MiB, most in each third: beside the guest {own}, of the guest {guest}')
    # A guest may use all of its memory; what is beside it must level off once the code caches were
    # full.
    grew = a.minutes >= 10 and own[2] > own[1] * 1.05 + 16
    if a.minutes < 10: print('too short to judge growth: give it 10 minutes or more')
    for line in wrong[:20]: print('WRONG', line)
    missing = [name for name in ROUNDS if not counts[name]]
    failed = wrong or grew or not ended or status or missing
    print('FAILED' if failed else 'ok', f'(wrong {len(wrong)}, grew {grew}, ended {ended}, status {status}, without a round {missing})')
    sys.exit(1 if failed else 0)
main()
