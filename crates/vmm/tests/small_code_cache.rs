//! Debian on a software engine that has room for little translated code: it throws everything away
//! again and again while both vCPUs run.
use image::debian;
use image::{Cache, Quiet};
use soft::{Options, SoftEngine};
use std::time::Duration;
use vmm::{
    BootSource, Bytes, CpuChoice, DeviceConfig, Host, Image, Machine, MachineConfig, Notice,
    Outcome, Serial,
};

const SCRIPT: &str = "i=0; while [ $i -lt 20 ]; do echo $i | sed s/^/line/ | sort; i=$((i+1)); done
seq 1 2000 | gzip | gunzip | md5sum
echo finished";

#[test]
fn debian_runs_with_a_code_cache_that_overflows_all_the_time() {
    let cache = Cache::open().unwrap();
    let debian = debian::prepare(&cache, &mut Quiet).unwrap();
    let busybox = std::fs::read(&debian.busybox).unwrap();
    let initrd = debian::initramfs(busybox, SCRIPT).unwrap().cpio();
    let engine = SoftEngine::with_options(Options { code_cache: 512 << 10, ..Options::default() });
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("serial");
    let config = MachineConfig {
        memory: Bytes(256 << 20),
        vcpus: 2,
        cpu: CpuChoice::Host,
        boot: BootSource {
            kernel: Image::open(&debian.kernel).unwrap(),
            initrd: Some(Image::from_bytes("initrd".into(), initrd).unwrap()),
            modules: Vec::new(),
            cmdline: "console=ttyS0 quiet".into(),
        },
        serial: Serial::File(output.clone()),
        no_reboot: true,
        debug_exit: false,
        devices: DeviceConfig::default(),
    };
    let engine = engine.unwrap();
    let mut notify = |notice: Notice<'_>| panic!("{notice:?}");
    let host = Host { signals: None, grace: Duration::ZERO, notify: &mut notify };
    let outcome = Machine::new(config, &engine).unwrap().run(host).unwrap();
    let text = std::fs::read_to_string(&output).unwrap();
    assert_eq!(outcome, Outcome::PowerOff, "{text}");
    assert_eq!(text.matches("line").count(), 20, "{text}");
    // `seq 1 2000 | md5sum` on any machine.
    assert!(text.contains("ea4d0a24dabcaa11f9aa979b872d162b  -"), "{text}");
    assert!(text.contains("finished"), "{text}");
}
