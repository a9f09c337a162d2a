//! Debian's own kernel and busybox, run by `bv`, do what they do on the host.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod console;
mod guest;
mod host;

use guest::{Guest, initramfs};
use host::on_the_host;

/// The same for the host and the guest: the shell, its programs, and `exercise`.
const EXERCISE: &str = include_str!("exercise.sh");
/// For the guest alone.
const ONLY_GUEST: &str = include_str!("only-guest.sh");

/// Runs both scripts as the host would: away from the terminal, in a folder of their own. The
/// terminal neither echoes nor changes what is written.
const START: &str = "
stty raw -echo
mkdir /tmp/work /tmp/guest
cd /tmp/work
echo '<exercise>'
sh /etc/exercise </dev/null 2>&1 | cat
echo '<guest>'
cd /tmp/guest
sh /etc/only-guest </dev/null 2>&1 | cat
echo '<end>'
";

/// What [`ONLY_GUEST`] must print.
fn only_guest(cpus: u32) -> String {
    let each = |line: &dyn Fn(u32) -> String, from| (from..cpus).map(line).collect::<String>();
    let ran = each(&|cpu| format!("CPU {cpu} ran on {cpu}\n"), 0);
    let came = each(&|cpu| format!("CPU {cpu} went, {} left, and came: {cpus}\n", cpus - 1), 1);
    format!(
        "system: Linux x86_64, {cpus} CPUs, {cpus} known\n{ran}{came}\
         full: 1048576 bytes, 1024 KiB\n\
         sparse: 0 KiB, all 64 KiB\n\
         1000\n\
         secret: refused\n\
         not for users\n\
         first of its namespace: 1\n\
         3 packets received\n\
         tmpfs is known\n"
    )
}

/// Boots Debian, runs both scripts, and compares all that they print.
fn exercise(cpus: u32, options: &str) {
    let files = tempfile::tempdir().unwrap();
    let mut initramfs = initramfs(START);
    initramfs.file("etc/exercise", 0o755, EXERCISE).unwrap();
    initramfs.file("etc/only-guest", 0o755, ONLY_GUEST).unwrap();
    let program = std::fs::read(exercise_guest::PATH).unwrap();
    initramfs.file("bin/exercise", 0o755, program).unwrap();
    let (cpus_text, cmdline) = (cpus.to_string(), format!("console=ttyS0 quiet {options}"));
    let mut guest =
        Guest::boot(files.path(), &initramfs, &cmdline, &["--cpus", &cpus_text, "--no-reboot"]);
    let expected = on_the_host(files.path(), EXERCISE);
    let (status, log) = guest.end();
    assert_same(between(&log, "<exercise>\n", "<guest>\n"), &expected, &log);
    assert_same(between(&log, "<guest>\n", "<end>\n"), &only_guest(cpus), &log);
    assert_eq!(status, Some(0), "{log}");
}

/// The part of a serial log between two lines.
fn between<'log>(log: &'log str, from: &str, to: &str) -> &'log str {
    let part = log.split_once(from).and_then(|(_, rest)| rest.split_once(to));
    part.unwrap_or_else(|| panic!("no text between {from:?} and {to:?} in:\n{log}")).0
}

/// Compares texts, and shows the first line that differs.
fn assert_same(actual: &str, expected: &str, log: &str) {
    if actual == expected {
        return;
    }
    let same = actual.lines().zip(expected.lines()).take_while(|(a, b)| a == b).count();
    panic!(
        "line {} of the guest is {:?} and must be {:?}; all of the serial log:\n{log}",
        same + 1,
        actual.lines().nth(same),
        expected.lines().nth(same),
    );
}

#[test]
fn debian_works_on_one_cpu() {
    exercise(1, "");
}

#[test]
fn debian_works_on_one_cpu_at_its_own_address() {
    exercise(1, "nokaslr");
}

#[test]
fn debian_works_on_two_cpus() {
    exercise(2, "");
}

#[test]
fn debian_works_on_two_cpus_at_its_own_address() {
    exercise(2, "nokaslr");
}

#[test]
fn debian_works_on_four_cpus() {
    exercise(4, "");
}

#[test]
fn debian_works_on_four_cpus_at_its_own_address() {
    exercise(4, "nokaslr");
}

/// The flags that `/proc/cpuinfo` shows Debian on a CPU model, and what that printed besides.
fn flags_on(cpu: &str) -> (Vec<String>, String) {
    let files = tempfile::tempdir().unwrap();
    let initramfs = initramfs("grep -E '^(flags|model name)' /proc/cpuinfo\necho '<end>'\n");
    let arguments = ["--engine=soft", "--cpu", cpu, "--no-reboot"];
    let mut guest = Guest::boot(files.path(), &initramfs, "console=ttyS0 quiet", &arguments);
    let (status, log) = guest.end();
    assert_eq!(status, Some(0), "{log}");
    let flags = between(&log, "flags\t\t: ", "\r\n");
    (flags.split(' ').map(str::to_owned).collect(), log)
}

#[test]
fn debian_sees_exactly_the_instruction_sets_of_its_cpu_model() {
    let v2 = ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"];
    let v3 = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"];
    let neither = ["aes", "pclmulqdq", "rdrand", "sha_ni", "adx", "fsgsbase", "smep", "xsaveopt"];
    for (cpu, level) in [("x86-64-v2", 2), ("x86-64-v3", 3)] {
        let (flags, log) = flags_on(cpu);
        let has = |name: &str| flags.iter().any(|flag| flag == name);
        assert!(log.contains(&format!("Bivisor {cpu}")), "{log}");
        assert!(v2.iter().all(|name| has(name)), "{log}");
        assert!(v3.iter().all(|name| has(name) == (level == 3)), "{log}");
        assert!(!neither.iter().any(|name| has(name)), "{log}");
    }
}

#[test]
fn debian_that_reboots_boots_again_and_can_then_switch_off() {
    let files = tempfile::tempdir().unwrap();
    let initramfs = initramfs("echo '<booted>'\nread -r command\n$command\nsleep 1000\n");
    let mut guest = Guest::boot(files.path(), &initramfs, "console=ttyS0 quiet", &[]);
    guest.wait_for("<booted>\r\n");
    guest.send("reboot\n");
    guest.wait_for("<booted>\r\n");
    guest.send("poweroff\n");
    let (status, log) = guest.end();
    assert_eq!((status, log.matches("<booted>").count()), (Some(0), 2), "{log}");
}

#[test]
fn debian_that_reboots_ends_with_success_where_it_shall_not_reboot() {
    let files = tempfile::tempdir().unwrap();
    let initramfs = initramfs("echo '<booted>'\nreboot\nsleep 1000\n");
    let mut guest = Guest::boot(files.path(), &initramfs, "console=ttyS0 quiet", &["--no-reboot"]);
    let (status, log) = guest.end();
    assert_eq!((status, log.matches("<booted>").count()), (Some(0), 1), "{log}");
}

#[test]
fn standard_output_is_exactly_what_debian_wrote_to_its_serial_port() {
    let files = tempfile::tempdir().unwrap();
    let every_byte: Vec<u8> = (0..40_000u32).map(|n| (n ^ n >> 8) as u8).collect();
    let mut initramfs = initramfs("stty raw -echo\necho '<bytes>'\ncat /etc/bytes\necho '<end>'\n");
    initramfs.file("etc/bytes", 0o644, every_byte.as_slice()).unwrap();
    let mut guest = Guest::boot(files.path(), &initramfs, "console=ttyS0 quiet", &["--no-reboot"]);
    let (status, output) = guest.end_with_bytes();
    let all = [b"<bytes>\n", every_byte.as_slice(), b"<end>\n"].concat();
    let found = output.windows(all.len()).any(|part| part == all);
    assert!(found, "the bytes are not in {} bytes of output", output.len());
    assert_eq!(status, Some(0));
    // But for which engine it is.
    let others = |line: &&str| !line.contains("using the soft engine");
    assert_eq!(guest.messages().lines().find(others), None);
}
