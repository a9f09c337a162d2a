//! Files out of a .deb package.

use crate::{ImageError, Programs};
use std::io::{self, Read};
use std::path::Path;

/// The largest file taken out of a package. Kernels are tens of MB; more than this is no kernel,
/// and a damaged archive must not make this process ask for the memory.
const LARGEST: u64 = 512 << 20;

/// A file to take: its path in the package begins and ends so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub starts: &'static str,
    pub ends: &'static str,
}

/// A file of a package.
pub(crate) struct Found {
    /// Without leading `./`.
    pub path: String,
    pub content: Vec<u8>,
}

/// Takes the first regular file that fits each of `wanted`, in that order. Only as much of the
/// package is unpacked as it takes to find them all, and nothing touches the disk.
pub(crate) fn read(
    programs: &Programs,
    deb: &Path,
    wanted: &[Wanted],
) -> Result<Vec<Option<Found>>, ImageError> {
    let deb = deb.to_string_lossy();
    let mut child = programs.reader("dpkg-deb", &["--fsys-tarfile", &deb])?;
    let found = match child.stdout.take() {
        Some(pipe) => search(pipe, wanted),
        None => Ok(Vec::new()),
    };
    // The pipe is closed, so dpkg-deb ends by itself; how does not matter: the package was
    // verified before, and what is missing shows in the result.
    let _ = child.wait();
    found.map_err(|source| ImageError::Run { program: "dpkg-deb", source })
}

fn search(tar: impl Read, wanted: &[Wanted]) -> io::Result<Vec<Option<Found>>> {
    let mut found: Vec<Option<Found>> = wanted.iter().map(|_| None).collect();
    for entry in tar::Archive::new(tar).entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
        let fits = |wanted: &Wanted| path.starts_with(wanted.starts) && path.ends_with(wanted.ends);
        let place =
            wanted.iter().zip(&mut found).find(|(wanted, place)| place.is_none() && fits(wanted));
        if let Some((_, place)) = place {
            if entry.size() > LARGEST {
                return Err(io::Error::other(format!("{path} is too large to be true")));
            }
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            if content.len() as u64 != entry.size() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            *place = Some(Found { path, content });
        }
        if found.iter().all(Option::is_some) {
            break;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    const KERNEL: Wanted = Wanted { starts: "boot/vmlinuz-", ends: "" };
    const BUTTON: Wanted = Wanted { starts: "lib/", ends: "/button.ko" };

    #[test]
    fn wanted_files_are_found_in_the_order_asked_and_missing_ones_are_none() {
        let tar = archive(&[("./lib/x/button.ko", b"b"), ("./boot/vmlinuz-6", b"k")]);
        let found = search(&tar[..], &[KERNEL, BUTTON]).unwrap();
        let contents: Vec<_> = found.iter().flatten().map(|file| &file.content[..]).collect();
        assert_eq!(contents, [b"k", b"b"]);
        let tar = archive(&[("./boot/vmlinuz-6", b"k")]);
        assert!(search(&tar[..], &[BUTTON]).unwrap().iter().all(Option::is_none));
    }

    #[test]
    fn a_cut_off_archive_is_an_error_only_for_what_lies_beyond_the_cut() {
        let tar = archive(&[("boot/vmlinuz-6", b"k"), ("lib/button.ko", &[1; 4096])]);
        let cut = &tar[..2048];
        assert!(search(cut, &[KERNEL]).is_ok());
        assert!(search(cut, &[KERNEL, BUTTON]).is_err());
    }
}
