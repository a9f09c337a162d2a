//! Downloads of disks, with the machine's curl from a server in this process.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use image::{
    Catalogue, Format, Image, Programs, Progress, PullError, Quiet, Stage, Step, Store, pull_with,
};
use sha2::{Digest, Sha512};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What the server does with a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    /// Gives what is asked for.
    Good,
    /// Promises all and hangs up in the middle.
    HangsUp,
    /// Does not know ranges.
    NoRanges,
    /// Has no such file.
    Gone,
}

/// A server of one file, at `/old/disk`, which redirects to `/disk`.
struct Server {
    url: String,
    mood: Arc<Mutex<Mood>>,
    /// Bytes of the file that it sent.
    sent: Arc<AtomicUsize>,
}

impl Server {
    fn of(content: &[u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/old/disk", listener.local_addr().unwrap());
        let (mood, sent) = (Arc::new(Mutex::new(Mood::Good)), Arc::new(AtomicUsize::new(0)));
        let (content, moods, count) = (content.to_vec(), mood.clone(), sent.clone());
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mood = *moods.lock().unwrap();
                count.fetch_add(answer(stream, &content, mood), Ordering::SeqCst);
            }
        });
        Self { url, mood, sent }
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn sent(&self) -> usize {
        self.sent.swap(0, Ordering::SeqCst)
    }
}

/// Answers one request, and says how many bytes of the content it sent.
fn answer(mut stream: TcpStream, content: &[u8], mood: Mood) -> usize {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut first, mut from) = (String::new(), 0);
    reader.read_line(&mut first).unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            from = range.trim().trim_end_matches('-').parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let (status, part) = if mood == Mood::Gone {
        ("404 Not Found", &b""[..])
    } else if first.contains("/old/") {
        ("302 Found\r\nLocation: /disk", &b""[..])
    } else if from > 0 && mood != Mood::NoRanges {
        ("206 Partial Content", &content[from..])
    } else {
        ("200 OK", content)
    };
    let range = if status.starts_with("206") {
        format!("Content-Range: bytes {from}-{}/{}\r\n", content.len() - 1, content.len())
    } else {
        String::new()
    };
    let head = format!(
        "HTTP/1.1 {status}\r\n{range}Content-Length: {}\r\nConnection: close\r\n\r\n",
        part.len()
    );
    let end = if mood == Mood::HangsUp { part.len() / 2 } else { part.len() };
    // A client that hangs up first is its own matter.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&part[..end]));
    end
}

struct World {
    folder: tempfile::TempDir,
    server: Server,
    catalogue: Catalogue,
}

fn disk() -> Vec<u8> {
    (0..300_000u32).flat_map(u32::to_le_bytes).collect()
}

impl World {
    /// A catalogue that has a disk with this sum at a server.
    fn with_sum(sum: &str) -> Self {
        let server = Server::of(&disk());
        let text = format!(
            "[image.'d:1']\ndescription='a disk'\nurl='{}'\nsha512='{sum}'\nformat='qcow2'\n",
            server.url
        );
        let catalogue = Catalogue::parse(&text).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), server, catalogue }
    }

    fn new() -> Self {
        let sum: String = Sha512::digest(disk()).iter().map(|byte| format!("{byte:02x}")).collect();
        Self::with_sum(&sum)
    }

    fn store(&self) -> Store {
        Store::at(self.folder.path()).unwrap()
    }

    fn pull_reporting(&self, progress: &mut dyn Progress) -> Result<Image, PullError> {
        let programs = Programs::of_this_machine();
        pull_with(&programs, &self.store(), &self.catalogue, "d:1", false, progress)
    }

    fn pull(&self) -> Result<Image, PullError> {
        self.pull_reporting(&mut Quiet)
    }

    /// The names in the store's folder that are not its own.
    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| name != "lock" && name != "names").collect()
    }
}

#[test]
fn a_disk_is_downloaded_verified_and_kept() {
    struct Steps(Vec<Step>);
    impl Progress for Steps {
        fn report(&mut self, step: &Step) {
            self.0.push(step.clone());
        }
    }
    let (world, mut steps) = (World::new(), Steps(Vec::new()));
    let image = world.pull_reporting(&mut steps).unwrap();
    assert_eq!(fs::read(image.disk()).unwrap(), disk());
    assert_eq!((image.format(), image.description()), (Format::Qcow2, "a disk"));
    assert_eq!(image.seed_reader(), image::seed::SeedReader::CloudInit);
    let stage = Stage::Downloading("disk".into());
    let last = steps.0.iter().rfind(|step| step.stage == stage).unwrap();
    assert_eq!((last.done, last.total), (disk().len() as u64, Some(disk().len() as u64)));
    assert_eq!(world.left(), [image.id()]);
    world.server.sent();
    world.pull().unwrap();
    assert_eq!(world.server.sent(), 0, "it is there already");
}

#[test]
fn a_download_that_is_cut_off_goes_on_where_it_ended() {
    let world = World::new();
    world.server.set(Mood::HangsUp);
    let error = world.pull().unwrap_err();
    assert!(error.to_string().contains("goes on from here"), "{error}");
    assert!(world.store().list().unwrap().is_empty());
    world.server.set(Mood::Good);
    world.server.sent();
    let image = world.pull().unwrap();
    assert_eq!(world.server.sent(), disk().len() / 2);
    assert_eq!((fs::read(image.disk()).unwrap(), world.left()), (disk(), vec![image.id()]));
}

#[test]
fn a_server_that_cannot_go_on_is_asked_for_all() {
    let world = World::new();
    world.server.set(Mood::HangsUp);
    world.pull().unwrap_err();
    world.server.set(Mood::NoRanges);
    assert_eq!(fs::read(world.pull().unwrap().disk()).unwrap(), disk());
}

#[test]
fn a_disk_with_another_sum_is_refused_and_not_kept() {
    let world = World::with_sum(&"0".repeat(128));
    let error = world.pull().unwrap_err().to_string();
    assert!(error.contains("not the file that the catalogue names"), "{error}");
    assert!(error.contains("not with 0000000000000000"), "{error}");
    assert!(world.left().is_empty());
}

#[test]
fn a_disk_that_is_gone_is_told_in_curls_words() {
    let world = World::new();
    world.server.set(Mood::Gone);
    let error = world.pull().unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("404"), "{error}: {source}");
    assert!(world.left().is_empty());
}

#[test]
fn what_was_cut_off_and_is_not_wanted_goes_with_prune() {
    let world = World::new();
    world.server.set(Mood::HangsUp);
    world.pull().unwrap_err();
    let pruned = world.store().prune(false, &mut Quiet).unwrap();
    assert_eq!((pruned.images, pruned.bytes), (0, disk().len() as u64 / 2));
    assert!(world.left().is_empty());
}
