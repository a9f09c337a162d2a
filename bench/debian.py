#!/usr/bin/env python3
"""From the start of the process to the login of a whole Debian 12, in Bivisor and in QEMU's TCG, by
turns: the same image, kernel, initramfs and kinds of device, each time on a new overlay.

  ../target/release/bv image pull debian:12     # once
  ./debian.py --runs 3
"""
import argparse, os, pty, re, select, signal, subprocess, sys, tempfile, time
HERE = os.path.dirname(os.path.abspath(__file__))
LOGIN = b'root (automatic login)'

def image(name):
    data = os.environ.get('XDG_DATA_HOME') or os.path.expanduser('~/.local/share')
    store = os.path.join(data, 'bivisor/images')
    name = open(os.path.join(store, 'names', name)).read().strip()
    return os.path.join(store, name)

def to_login(command):
    """Seconds to the login, CPU seconds, resident MiB; None where it does not come."""
    start = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0: os.execvp(command[0], command)
    output = b''
    try:
        while LOGIN not in output and time.monotonic() - start < 300:
            if not select.select([terminal], [], [], 1)[0]: continue
            try: output += os.read(terminal, 65536)
            except OSError: break
        wall = time.monotonic() - start
        if LOGIN not in output: return None
        fields = open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
        resident = int(re.search(r'VmRSS:\s+(\d+)', open(f'/proc/{pid}/status').read())[1]) // 1024
        return wall, cpu, resident
    finally:
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); os.close(terminal)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=3)
    parser.add_argument('--bv', default=HERE + '/../target/release/bv')
    a = parser.parse_args()
    folder = image('debian:12')
    cmdline = re.search(r'^cmdline = "(.*)"', open(folder + '/image.toml').read(), re.M)[1] + ' console=ttyS0'
    print('| vCPUs | vmm | s to login | CPU s | resident MiB |\n|---|---|---|---|---|')
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for cpus in (1, 2):
            results = {'bivisor': [], 'qemu': []}
            for _ in range(a.runs):
                overlay = scratch + '/overlay.qcow2'
                if os.path.exists(overlay): os.remove(overlay)
                subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', folder + '/disk.raw', overlay, '10G'], check=True)
                results['bivisor'].append(to_login([a.bv, 'run', 'debian:12', '--engine', 'soft', '--temporary', '--cpus', str(cpus)]))
                threads = 'single' if cpus == 1 else 'multi'
                results['qemu'].append(to_login(['qemu-system-x86_64', '-M', 'q35', '-accel', f'tcg,thread={threads}', '-cpu', 'max',
                    '-smp', str(cpus), '-m', '1024', '-nodefaults', '-no-user-config', '-display', 'none', '-vga', 'none',
                    '-serial', 'stdio', '-monitor', 'none', '-kernel', folder + '/vmlinuz', '-initrd', folder + '/initrd.cpio',
                    '-append', cmdline, '-drive', f'file={overlay},if=virtio,format=qcow2', '-nic', 'user,model=virtio-net-pci',
                    '-device', 'virtio-rng-pci']))
            for name, runs in results.items():
                if None in runs:
                    failed = True
                    print(f'| {cpus} | {name} | no login | | |')
                    continue
                wall, cpu, resident = (min(run[n] for run in runs) for n in range(3))
                print(f'| {cpus} | {name} | {wall:.2f} | {cpu:.2f} | {resident} |', flush=True)
    sys.exit(1 if failed else 0)
main()
