//! Files: written, read, sought, truncated, renamed, linked, listed.

use crate::hash::{Generator, sha256};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

const FOLDER: &str = "exercise-files";

pub fn exercise() {
    fs::create_dir(FOLDER).unwrap();
    std::env::set_current_dir(FOLDER).unwrap();
    contents();
    names();
    std::env::set_current_dir("..").unwrap();
    fs::remove_dir_all(FOLDER).unwrap();
    println!("files: gone {:?}", fs::metadata(FOLDER).unwrap_err().kind());
}

fn contents() {
    let data = Generator(9).bytes(300_000);
    fs::write("data", &data).unwrap();
    assert_eq!(fs::read("data").unwrap(), data);
    let mut file = OpenOptions::new().read(true).write(true).open("data").unwrap();
    file.seek(SeekFrom::Start(4090)).unwrap();
    file.write_all(b"across a page").unwrap();
    file.write_all_at(b"at the end", 299_995).unwrap();
    file.set_len(1 << 20).unwrap();
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(299_990)).unwrap();
    file.read_to_end(&mut tail).unwrap();
    println!("files: length {} tail {:?}", file.metadata().unwrap().len(), &tail[..20]);
    assert!(tail[20..].iter().all(|byte| *byte == 0));
    println!("files: sha256 {}", sha256(&fs::read("data").unwrap()));

    let mut log = OpenOptions::new().append(true).create_new(true).open("log").unwrap();
    for number in 0..1000 {
        writeln!(log, "line {number} {}", number * number).unwrap();
    }
    let lines = BufReader::new(File::open("log").unwrap()).lines();
    let sum: usize = lines.map(|line| line.unwrap().len()).sum();
    println!("files: log sum {sum}, copied {}", fs::copy("log", "copy").unwrap());
}

fn names() {
    fs::rename("copy", "moved").unwrap();
    fs::hard_link("moved", "hard").unwrap();
    symlink("moved", "soft").unwrap();
    fs::set_permissions("moved", Permissions::from_mode(0o640)).unwrap();
    let hard = fs::metadata("hard").unwrap();
    println!("files: mode {:o} links {}", hard.mode(), hard.nlink());
    println!("files: link to {}", fs::read_link("soft").unwrap().display());
    for number in 0..200 {
        fs::create_dir_all(format!("tree/{}/{number}", number % 7)).unwrap();
    }
    let mut names: Vec<String> = fs::read_dir("tree/3")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    println!("files: {} folders, {}", names.len(), names.join(" "));
    let kind = |result: std::io::Result<()>| result.map_err(|error| error.kind()).unwrap_err();
    println!("files: remove {:?}", kind(fs::remove_dir("tree/3")));
    println!("files: again {:?}", kind(fs::create_dir("tree")));
    assert_eq!(kind(fs::remove_file("nothing")), ErrorKind::NotFound);
}
