//! A tap device with the host's own stack behind it, in a network namespace of the test's own, for
//! which no rights are needed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use net::tap::{Tap, TapError};
use net::{Accepts, Network, Nic, Offload, Packet, TapName};
use std::collections::VecDeque;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

const HANG: Duration = Duration::from_secs(30);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

#[derive(Default)]
struct Card {
    frames: Mutex<VecDeque<Vec<u8>>>,
    arrived: Condvar,
}

impl Nic for Card {
    fn accepts(&self) -> Accepts {
        Accepts { checksum: true, tcp4: true, tcp6: true }
    }

    fn receive(&self, packet: Packet<'_>) -> bool {
        self.frames.lock().unwrap().push_back(packet.frame.to_vec());
        self.arrived.notify_all();
        true
    }
}

impl Card {
    /// The next frame that `wanted` likes.
    fn wait_for(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut frames = self.frames.lock().unwrap();
        loop {
            while let Some(frame) = frames.pop_front() {
                if wanted(&frame) {
                    return frame;
                }
            }
            let (again, timeout) = self.arrived.wait_timeout(frames, HANG).unwrap();
            assert!(!timeout.timed_out(), "the host does not answer");
            frames = again;
        }
    }
}

fn run(command: &str) {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output();
    let output = output.unwrap_or_else(|error| {
        panic!("cannot run {command:?} ({error}); install: apt-get install iproute2")
    });
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What the test runs in a namespace of its own; there is nothing to do elsewhere.
#[test]
fn inside_the_namespace() {
    if std::env::var_os("TAP_TEST_NAMESPACE").is_none() {
        return;
    }
    run("ip tuntap add dev tap0 mode tap");
    run("ip addr add 10.9.0.1/24 dev tap0");
    run("ip link set tap0 up");
    run("ip tuntap add dev tun0 mode tun");
    let error = Tap::open(&"tun0".parse().unwrap()).err().unwrap();
    assert!(matches!(error, TapError::NotTap(_)), "{error}");
    let name: TapName = "tap0".parse().unwrap();
    let tap = Tap::open(&name).unwrap();
    assert!(matches!(Tap::open(&name), Err(TapError::Busy(_))));
    let card = Arc::new(Card::default());
    tap.plug(Some(Arc::clone(&card) as Arc<dyn Nic>));

    let send = |frame: &[u8]| tap.transmit(Packet { frame, offload: Offload::default() });
    let request = [
        &[0xff; 6][..],
        &MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &MAC,
        &[10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 1],
    ];
    send(&request.concat());
    let reply = card.wait_for(|frame| frame[12..14] == [8, 6] && frame[21] == 2);
    let host = &reply[6..12];
    let mut ping = [host, &MAC, &[8, 0, 0x45, 0, 0, 32, 0, 1, 0x40, 0, 64, 1, 0, 0]].concat();
    ping.extend([10, 9, 0, 2, 10, 9, 0, 1, 8, 0, 0, 0, 0, 7, 0, 1, b'p', b'i', b'n', b'g']);
    for (start, end, field) in [(14, 34, 24), (34, 46, 36)] {
        let mut sum: u32 = ping[start..end]
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        sum = (sum & 0xffff) + (sum >> 16);
        ping[field..field + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    send(&ping);
    let pong = card.wait_for(|frame| frame[12..14] == [8, 0] && frame[23] == 1);
    assert_eq!((pong[34], &pong[42..46]), (0, &b"ping"[..]));
    tap.plug(None);
    drop(tap);
    assert!(Tap::open(&name).is_ok(), "the device is free again");
}

#[test]
fn a_tap_device_connects_the_guest_with_the_host() {
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "inside_the_namespace", "--nocapture"])
        .env("TAP_TEST_NAMESPACE", "1")
        .output()
        .unwrap_or_else(|error| panic!("no unshare ({error}): apt-get install util-linux"));
    assert!(
        output.status.success(),
        "in a namespace of its own (if that cannot be made: sysctl kernel.unprivileged_userns_clone=1, \
         modprobe tun): {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
